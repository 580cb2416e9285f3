"""Relevance rules; each is a frozen dataclass whose numbers are pytree leaves."""

from .activation import BetaSmooth, DeconvNet, Gradient, GuidedBackprop, Pass, SoftmaxTaylor
from .arithmetic import by_parts, divide, stabilise, summed
from .base import KERNEL, LINEAR, Layer, Rule, broadcasts, rule
from .domain import Flat, WSquare, ZBox
from .linear import AlphaBeta, Epsilon, FourQuadrant, Gamma, GeneralizedGamma, Norm, Zero, ZPlus, in_proportion, share
from .normalisation import ConstantStatistics
from .pattern import PatternAttribution, PatternNet
from .pooling import AbsoluteShare, Proportional, Winner
from .product import Uniform, UniformEpsilon
from .response import LocalResponseTaylor

__all__ = [
    "KERNEL",
    "LINEAR",
    "AbsoluteShare",
    "AlphaBeta",
    "BetaSmooth",
    "ConstantStatistics",
    "DeconvNet",
    "Epsilon",
    "Flat",
    "FourQuadrant",
    "Gamma",
    "GeneralizedGamma",
    "Gradient",
    "GuidedBackprop",
    "Layer",
    "LocalResponseTaylor",
    "Norm",
    "Pass",
    "PatternAttribution",
    "PatternNet",
    "Proportional",
    "Rule",
    "SoftmaxTaylor",
    "Uniform",
    "UniformEpsilon",
    "WSquare",
    "Winner",
    "ZBox",
    "ZPlus",
    "Zero",
    "broadcasts",
    "by_parts",
    "divide",
    "in_proportion",
    "rule",
    "share",
    "stabilise",
    "summed",
]
