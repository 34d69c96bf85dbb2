"""Training: text, losses, recipe, runs that can be stopped and resumed."""
