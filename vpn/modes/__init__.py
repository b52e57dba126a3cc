"""Ways to make a tunnel, one file each; ``base`` is what they have in common."""
