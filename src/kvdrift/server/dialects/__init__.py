"""One module for each server: how it is asked, what it answers, and which of its habits would spoil a comparison."""
