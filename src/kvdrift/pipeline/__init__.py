"""The only modules that know the whole way from an engine or a directory to a report."""
