"""Configurations: `get_config(arg)` in each file returns one ConfigDict; base.py has every key."""

if __name__ == "configs":  # by its old name, in a checkout
    from sgw_jax import moved

    moved.redirect(__name__)
