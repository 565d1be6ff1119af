"""Budgets: how sparse each leaf becomes for a given sparsity of the whole.

A budget is a tree like the parameters with one Python float per leaf, the fraction to remove; leaves that
are not pruned get 0. All take bounds (`max_sparsity=`, `min_keep=`, `fixed=`), and meet the total exactly
within them.
"""

from jaxprune.budgets._flops import flops
from jaxprune.budgets._outliers import owl
from jaxprune.budgets._shapes import er, erk, linear, uniform
from jaxprune.budgets._values import global_, lamp

__all__ = ["er", "erk", "flops", "global_", "lamp", "linear", "owl", "uniform"]
