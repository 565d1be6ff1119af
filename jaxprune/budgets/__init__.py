"""Budgets: per-leaf sparsity for a sparsity of the whole tree."""

from jaxprune.budgets._budgets import erk, uniform

__all__ = ["erk", "uniform"]
