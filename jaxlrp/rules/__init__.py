"""Relevance rules; each is a frozen dataclass whose numbers are pytree leaves."""

from .activation import BetaSmooth, DeconvNet, Gradient, GuidedBackprop, Pass, SoftmaxTaylor, Stop
from .arithmetic import by_parts, divide, stabilise, summed
from .attention import Attention
from .base import KERNEL, LINEAR, Rule, broadcasts, rule
from .domain import Flat, WSquare, ZBox
from .embedding import EmbeddingSum
from .layer import Elementwise, Layer
from .linear import AlphaBeta, Epsilon, FourQuadrant, Gamma, GeneralizedGamma, Norm, Zero, ZPlus, in_proportion, share
from .normalisation import ConstantStatistics
from .pattern import PatternAttribution, PatternNet
from .pooling import AbsoluteShare, Proportional, Winner
from .product import Uniform, UniformEpsilon
from .recurrent import SignalTakesAll
from .response import LocalResponseTaylor

__all__ = [
    "KERNEL",
    "LINEAR",
    "AbsoluteShare",
    "AlphaBeta",
    "Attention",
    "BetaSmooth",
    "ConstantStatistics",
    "DeconvNet",
    "EmbeddingSum",
    "Epsilon",
    "Flat",
    "FourQuadrant",
    "Gamma",
    "GeneralizedGamma",
    "Gradient",
    "GuidedBackprop",
    "Elementwise",
    "Layer",
    "LocalResponseTaylor",
    "Norm",
    "Pass",
    "PatternAttribution",
    "PatternNet",
    "Proportional",
    "Rule",
    "SignalTakesAll",
    "SoftmaxTaylor",
    "Stop",
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
