"""Train multi-token-prediction heads on a frozen DeepSeek-V4 backbone and measure what they gain."""

__version__ = "0.2.0"
