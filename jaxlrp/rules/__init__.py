"""Relevance rules; each is a frozen dataclass whose numbers are pytree leaves."""

from .activation import Pass, SoftmaxTaylor
from .base import KERNEL, LINEAR, Layer, Rule, divide, rule, stabilise
from .linear import AlphaBeta, Epsilon, Flat, Gamma, GeneralizedGamma, WSquare, ZBox, Zero, ZPlus
from .pooling import Winner
from .product import Uniform, UniformEpsilon

__all__ = [
    "KERNEL",
    "LINEAR",
    "AlphaBeta",
    "Epsilon",
    "Flat",
    "Gamma",
    "GeneralizedGamma",
    "Layer",
    "Pass",
    "Rule",
    "SoftmaxTaylor",
    "Uniform",
    "UniformEpsilon",
    "WSquare",
    "Winner",
    "ZBox",
    "ZPlus",
    "Zero",
    "divide",
    "rule",
    "stabilise",
]
