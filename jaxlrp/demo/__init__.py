"""The demo's models and data: a small CNN on Fashion-MNIST, EfficientNet-Lite0 on ImageNet, and two photos."""
