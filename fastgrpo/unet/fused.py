"""diffusers' UNet with its normalisations and activations computed by this project's operators.

    ResnetBlock2D            GroupNorm + SiLU, and time embedding + GroupNorm + SiLU, are one operator each; the bias of
                             the convolution between them comes with the time embedding
    Transformer2DModel       GroupNorm; its 1 x 1 convolutions are linear layers on tokens
    UNet2DConditionModel     conv_norm_out + conv_act
    BasicTransformerBlock    its LayerNorms and the additions before them
    GEGLU                    the bias of its linear layer, and the activation

The decoder of diffusers' AutoencoderKL consists of the first, without a time embedding, and the third.

A module is patched by giving it a subclass of its own class. Parameters, submodules, names and attributes stay, so
state dicts, optimisers, LoRA adapters, deepcopy and pickle see no difference. What the subclasses do not do is left
alone: up- or downsampling within a ResnetBlock2D, a time embedding that scales, adaptive norms, other activations,
norms without weights or wrapped by something else. Not called are forward hooks on the GroupNorms, activations and
`conv1` of a patched ResnetBlock2D, the convolutions of a Transformer2DModel and the linear layer of a GEGLU.
"""

from typing import Any, TypeGuard

from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from fastgrpo.kernels.geglu import geglu
from fastgrpo.kernels.group_norm_silu import group_norm_silu
from fastgrpo.kernels.layer_norm import MAX_WIDTH, layer_norm


class FusedResnetBlock2D(ResnetBlock2D):
    def forward(self, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
        hidden = _group_norm(self.norm1, input_tensor, silu=True)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if type(self.conv1) is nn.Conv2d and self.conv1.bias is not None:
            # Neither cuDNN nor a compiler adds a bias within a convolution. Alone it is a pass over all pixels, and its
            # gradient another; the time embedding, added before the second norm anyway, has one row a sample.
            hidden = self.conv1._conv_forward(hidden, self.conv1.weight, None)
            bias = self.conv1.bias.to(hidden.dtype)
            temb = bias.expand(len(hidden), -1) if temb is None else temb + bias
        else:
            hidden = self.conv1(hidden)
        hidden = self.conv2(self.dropout(_group_norm(self.norm2, hidden, silu=True, temb=temb)))
        # The shortcut's input keeps its layout. diffusers makes it contiguous in training: two copies of activations.
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output = input_tensor + hidden
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor


class FusedTransformer2DModel(Transformer2DModel):
    """Its tokens [N, H * W, C] are views of channels-last images [N, C, H, W] on the way in and on the way out."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        if not self._takes_tokens(self.proj_in):
            return super()._operate_on_continuous_inputs(hidden_states)
        tokens = _linear(self.proj_in, self.norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2))
        return tokens, tokens.shape[-1]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if not self._takes_tokens(self.proj_out):
            return super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
        image = _linear(self.proj_out, hidden_states).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return residual + image  # in this order, so that the sum has the residual's layout

    def _takes_tokens(self, layer: nn.Module) -> bool:
        """Whether `_linear` can compute a projection: adapters around a convolution want an image."""
        return self.use_linear_projection or _is_pointwise(layer)


class FusedGroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return _group_norm(self, input, silu=False)


class FusedGroupNormSiLU(nn.GroupNorm):
    """Does the work of the SiLU that follows it, which becomes a `FusedAway`."""

    def forward(self, input: Tensor) -> Tensor:
        return _group_norm(self, input, silu=True)


class FusedAway(nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return input


class FusedLayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor, residual: Tensor | None = None, keep: bool = False) -> Any:
        """Returns the norm; with a residual (input + residual, its norm); with `keep` (input to go on with, norm)."""
        return layer_norm(input, self.weight, self.bias, self.eps, residual, keep)


class FusedBasicTransformerBlock(BasicTransformerBlock):
    """Its second and third norm are each one operator with the addition before it; backward, so is the first."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *others: Any,
        **named_others: Any,
    ) -> Tensor:
        if self._chunk_size is not None or cross_attention_kwargs or hidden_states.ndim != 3:
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, *others, **named_others,
            )  # fmt: skip
        context = encoder_hidden_states if self.only_cross_attention else None
        hidden_states, normed = self.norm1(hidden_states, keep=True)
        attended = self.attn1(normed, encoder_hidden_states=context, attention_mask=attention_mask)
        hidden_states, normed = self.norm2(attended, hidden_states)
        attended = self.attn2(
            normed, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        hidden_states, normed = self.norm3(attended, hidden_states)
        return self.ff(normed) + hidden_states


class FusedGEGLU(GEGLU):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if type(self.proj) is nn.Linear:
            # The product is without the bias, whose gradient is then summed where the activation's is computed.
            return geglu(F.linear(hidden_states, self.proj.weight), self.proj.bias)
        return geglu(self.proj(hidden_states))


def patch_unet(unet: UNet2DConditionModel | Decoder) -> None:
    """Makes a UNet or a VAE's decoder use the operators, in place. Only rounding differs. Safe to call twice."""
    for module in unet.modules():
        if _is_plain_resnet(module):
            module.__class__ = FusedResnetBlock2D
        elif type(module) is Transformer2DModel and module.is_input_continuous:
            module.__class__ = FusedTransformer2DModel
            if _is_plain_group_norm(module.norm):
                module.norm.__class__ = FusedGroupNorm
        elif type(module) is BasicTransformerBlock:
            for norm in (module.norm1, module.norm2, getattr(module, "norm3", None)):
                if _is_plain_layer_norm(norm):
                    norm.__class__ = FusedLayerNorm
            if _is_plain_block(module):
                module.__class__ = FusedBasicTransformerBlock
        elif type(module) is GEGLU:
            module.__class__ = FusedGEGLU
    if _is_plain_group_norm(unet.conv_norm_out) and type(unet.conv_act) is nn.SiLU:
        unet.conv_norm_out.__class__ = FusedGroupNormSiLU
        unet.conv_act.__class__ = FusedAway


def _group_norm(norm: nn.GroupNorm, x: Tensor, silu: bool, temb: Tensor | None = None) -> Tensor:
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, temb)


def _linear(layer: nn.Module, tokens: Tensor) -> Tensor:
    """Calls a linear layer, or a convolution that is one, with tokens [N, T, in]; returns [N, T, out]."""
    return F.linear(tokens, layer.weight.flatten(1), layer.bias) if _is_pointwise(layer) else layer(tokens)


def _is_pointwise(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    plain = type(layer) is nn.Conv2d and layer.padding == (0, 0) and layer.groups == 1
    return plain and layer.kernel_size == layer.stride == (1, 1)


def _is_plain_resnet(module: nn.Module) -> bool:
    return (
        type(module) is ResnetBlock2D
        and module.upsample is None
        and module.downsample is None
        and (
            module.time_embedding_norm == "default"
            or (module.time_embedding_norm, module.time_emb_proj) == ("group", None)
        )
        and type(module.nonlinearity) is nn.SiLU
        and _is_plain_group_norm(module.norm1)
        and _is_plain_group_norm(module.norm2)
    )


def _is_plain_group_norm(module: nn.Module | None) -> bool:
    return type(module) is nn.GroupNorm and module.affine


def _is_plain_layer_norm(module: nn.Module | None) -> bool:
    return (
        type(module) is nn.LayerNorm
        and module.elementwise_affine
        and module.bias is not None
        and len(module.normalized_shape) == 1
        and module.normalized_shape[0] <= MAX_WIDTH
    )


def _is_plain_block(module: BasicTransformerBlock) -> bool:
    """Whether FusedBasicTransformerBlock can serve it, once its norms are patched."""
    return (
        module.norm_type == "layer_norm"
        and module.pos_embed is None
        and type(module.norm1) is type(module.norm2) is type(module.norm3) is FusedLayerNorm
    )
