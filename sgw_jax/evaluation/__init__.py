"""How good the predictions are, and what the interaction did for them."""
