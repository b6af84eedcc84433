"""ControlNets, which read the base prompt, and control LoRAs as extensions of sampling."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from extensions.controlnet import LoadedControl, Residuals, residual_after
from model.attention import Block
from model.transformer import FluxParams
from regional.extension import Branches, Conditioning, Extension, Forward, Pass
from sampler.flow import text_ids


def controlnets(
    controls: Sequence[LoadedControl], params: FluxParams, steps: int,
    conditioning: Conditioning, part: Callable[[Tensor], Tensor] = lambda x: x,
) -> Extension:  # fmt: skip
    """params: the transformer's; part: a process's part of the tokens, dimension 1."""
    depths = {"double": params.depth, "single": params.depth_single_blocks}
    txt, _, y = conditioning

    def residuals_of(control: LoadedControl, given: Pass, order: Tensor) -> Residuals:
        net, tokens, scale, setting = control
        modulation = net.modulation(given.timesteps, y[:1], given.guidance)
        inputs = (given.img, given.img_ids, txt, text_ids(txt.shape[1]))
        found = net(*inputs, modulation, tokens[:, order], setting.mode)
        for kind, own in found.items():
            found[kind] = [part(x * scale[order]) for x in own]
        return found

    def extend(forward: Forward, branches: Branches) -> Forward:
        def with_residuals(given: Pass, step: int) -> Tensor:
            acting = [x for x in controls if x.setting.acts(step, steps)]
            found = [residuals_of(x, given, branches.order) for x in acting]

            def after_block(x: Tensor, block: Block) -> Tensor:
                x = given.after_block(x, block)
                for control, residuals in zip(acting, found):
                    own = residuals[block.kind]
                    if not own:
                        continue
                    in_turn = control.net.params.hint_width > 0
                    residual = residual_after(block, own, depths[block.kind], in_turn)
                    alone = control.setting.residuals == "published"
                    add(x, residual, 1 if alone else branches.streams)
                return x

            return forward(given._replace(after_block=after_block), step)

        return with_residuals

    return extend


def add(x: Tensor, residual: Tensor, streams: int) -> None:
    """Add (B, L_img, D) to the last image streams of x (B, L, D), which is the block's own, in
    place. Single blocks beside a base branch have two, others one."""
    length = residual.shape[1]
    streams = min(streams, x.shape[1] // length)
    x[:, -streams * length :].unflatten(1, (streams, length)).add_(residual[:, None])


def control_lora(latents: Tensor) -> Extension:
    """A control LoRA's image: packed latents (1, L_img, 64), row by row."""

    def extend(forward: Forward, branches: Branches) -> Forward:
        own = latents[:, branches.order]

        def with_image(given: Pass, step: int) -> Tensor:
            both = torch.cat([given.img, own], dim=-1)
            return forward(given._replace(img=both), step)

        return with_image

    return extend
