"""Configurations: `get_config(arg)` in each file returns one ConfigDict; base.py has every key."""
