"""What several test modules share: tiny models of real architectures."""
