"""Many processes as one run: which one this is, how they meet, and what happens when one is lost."""
