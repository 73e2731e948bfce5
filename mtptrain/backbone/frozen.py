"""The class of a frozen backbone: transformers' DeepSeek-V4, with this project's modules before weights are read.

`from_pretrained` builds the model on the meta device, attaches accelerate's hooks or splits the experts, and reads the
weights last. A class that is replaced afterwards would leave accelerate's hooks on the old forward.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import DeepseekV4Config

from mtptrain.backbone.attention import use_linear_attention
from mtptrain.backbone.decode import make_indexers_causal
from mtptrain.backbone.modules import FrozenHyperConnection, replace_connections, replace_norms
from mtptrain.backbone.placement import split_experts


class DeepseekV4ForCausalLM(transformers.DeepseekV4ForCausalLM):
    """transformers' model on this project's kernels.

    Name and module are transformers': it finds conversions by the name, and reads the source of the module to learn
    which forms of experts and attention the class can take.
    """

    __module__ = transformers.DeepseekV4ForCausalLM.__module__

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__(config)
        replace_norms(self)
        make_indexers_causal(self)
        replace_connections(self, FrozenHyperConnection)
        use_linear_attention(self)

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """Split the experts over the processes; called on the meta model if `from_pretrained` got a distributed config.

        The loader then reads only the experts of this process.
        """
        return split_experts(model)
