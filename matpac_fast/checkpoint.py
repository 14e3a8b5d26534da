"""Safe load and save of weights; official formats both ways."""
