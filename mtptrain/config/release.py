"""A miniature release: what is imitated, and from what."""

from __future__ import annotations

from dataclasses import dataclass

from mtptrain.config.choices import ReleaseVariant


@dataclass(kw_only=True, slots=True)
class ReleaseConfig:
    """The folder that `recipe=mini_release` writes."""

    variant: ReleaseVariant = ReleaseVariant.release
    random: bool = False  # a random backbone of backbone.shape and a random head, instead of the configured backbone
