"""What a layout costs: FLOPs of the transformer's matrix products, two a multiplication."""

from functools import cache, partial

from model.transformer import FluxParams
from regional.attention import allowed
from regional.layout import FLUX_DEV, Layout
from regional.mask import RegionTokens, stage_ratios

Stage = tuple[int, int, str]  # its last step, the FLOPs of an evaluation, its name
MOST_BITS = 2048  # distinct ones of which all pairs are counted; of more, a sample


def resolved(layout: Layout, params: FluxParams) -> Layout:
    """For a transformer of these sizes, with the other defaults of FLUX.1-dev."""
    blocks = {key: getattr(params, key) for key in ("depth", "depth_single_blocks")}
    return layout.resolved(FLUX_DEV._replace(**blocks))


def cost(layout: Layout, params: FluxParams, tokens: RegionTokens) -> list[str]:
    """A line for each stage of a resolved layout, compared with plain FLUX.1."""
    return compared(layout, stages(layout, params, tokens))[0]


def compared(layout: Layout, found: list[Stage]) -> tuple[list[str], float]:
    """`cost`'s lines of these stages, and how many times plain FLUX.1 they cost."""
    plain = found[-1][1]
    lines = []
    start = total = 0
    for end, flops, what in found:
        count = evaluations(layout, start, end)
        if end > start:
            mean = count * flops / (end - start)
            each = f"{amount(mean)} each, {mean / plain:.2f} times a plain step"
            lines.append(f"steps {start + 1} to {end}: {what}, {each}")
        total += count * flops
        start = end
    times = total / (start * plain)
    lines.append(f"altogether: {amount(total)}, {times:.2f} times plain FLUX.1")
    parts = (layout, *layout.regions)
    if layout.controlnets or any(region.loras for region in layout.regions):
        lines[-1] += "; ControlNets and regions' LoRAs come on top"
    if any(part.image_prompts or part.references for part in parts):
        lines[-1] += "; image prompts and references come on top"
    return lines, times


def evaluations(layout: Layout, start: int, end: int) -> int:
    """How often steps ask for the velocity: Heun's twice, but for the image's last; true
    guidance for that of the negative prompts, too."""
    count = end - start
    if layout.sampler == "heun":
        count = 2 * count - (start < end == layout.run_steps())
    return count * (2 if layout.true_cfg_scale > 1 else 1)


def amount(flops: float) -> str:
    if flops >= 1e12:
        return f"{flops / 1e12:,.1f} TFLOP"
    return f"{flops / 1e9:,.1f} GFLOP"


def stages(layout: Layout, params: FluxParams, tokens: RegionTokens) -> list[Stage]:
    """The stages of equal steps; the plain one comes last."""
    name = "composed of the regions' images" if layout.method == "rpg" else "regional"
    work = cache(partial(regional_flops, layout, params, tokens))
    found = []
    covering = tokens.cover.numpy().any(axis=1).tolist()
    for end, ratios in stage_ratios(layout, tokens) if layout.regions else ():
        base = any(ratio > 0 for ratio, covers in zip(ratios, covering) if covers)
        what = name if base else f"{name}, no base branch"
        found.append((end, work(base), what))
    image = tokens.cover.shape[1]
    plain = plain_flops(params, layout.max_sequence_length, image)
    return [*found, (layout.run_steps(), plain, "plain")]


def regional_flops(layout: Layout, params: FluxParams, tokens: RegionTokens, base: bool) -> int:
    """FLOPs of a regional step, if attention costs exactly what the mask allows."""
    text = layout.max_sequence_length
    own = layout.region_max_sequence_length
    image = tokens.cover.shape[1]
    regions = len(tokens.prompts)
    if layout.method == "rpg":
        composed = regions * plain_flops(params, own, image)
        return composed + base * plain_flops(params, text, image)
    bits, count = tokens.bits(own).unique(return_counts=True)
    whole = int(count.sum())
    every = 1 + len(bits) // MOST_BITS
    bits = bits[::every]
    count = count[::every]
    both = count * count[:, None]
    allowed_pairs = int((allowed(bits[:, None], bits) * both).sum())
    allowed_pairs = round(allowed_pairs * (whole / int(count.sum())) ** 2)
    blocks = params.depth + params.depth_single_blocks
    masked = len(layout.double_blocks) + len(layout.single_blocks)
    pairs = masked * allowed_pairs
    pairs += (blocks - masked) * (regions * own + image) ** 2
    pairs += base * blocks * (text + image) ** 2
    streams = 1 + (base and layout.base_stream == "separate")
    return forward_flops(params, regions * own + base * text, image, pairs, streams)


def plain_flops(params: FluxParams, text: int, image: int) -> int:
    blocks = params.depth + params.depth_single_blocks
    pairs = blocks * (text + image) ** 2
    return forward_flops(params, text, image, pairs)


def forward_flops(params: FluxParams, text: int, image: int, pairs: int, streams: int = 1) -> int:
    """FLOPs of a pass. pairs: (query, key), of all blocks; streams: of the image, when single."""
    d = params.hidden_size
    mlp = 2 * d * params.mlp_hidden
    double = params.depth
    single = params.depth_single_blocks
    rows = double * (text + image) + single * (text + streams * image)
    blocks = rows * (4 * d * d + mlp) + 2 * d * pairs
    if single:  # the last block computes the rows of one image stream only
        blocks -= (text + (streams - 1) * image) * (d * d + mlp)
    channels = params.in_channels + params.out_channels
    ends = text * params.context_in_dim * d + image * channels * d
    modulation = (12 * double + 3 * single + 2) * d * d
    embedders = (1 + params.guidance_embed) * (256 + d) * d
    embedders += (params.vec_in_dim + d) * d
    return 2 * (blocks + ends + modulation + embedders)
