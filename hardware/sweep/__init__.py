"""Grids of methods, budgets and seeds: trained, deployed in the engine, and laid in one table."""
