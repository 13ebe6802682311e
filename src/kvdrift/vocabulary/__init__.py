"""What every part speaks: sites, addresses, precision, facts, plans, evidence, causes."""
