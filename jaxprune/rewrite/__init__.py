"""Rewrites of parameters that leave what a function computes as it is, read off its program."""

from jaxprune.rewrite._smooth_quant import smooth_quant

__all__ = ["smooth_quant"]
