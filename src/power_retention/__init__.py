"""Language models whose memory does not grow."""
