"""Advantages and returns: GAE, discounted returns, groups of answers, whitening."""
