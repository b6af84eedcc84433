"""What a layout costs, in floating-point operations of the transformer."""

from model.transformer import FluxParams
from regional.layout import FLUX_DEV, Layout
from regional.mask import RegionTokens, allowed, regional_stages


def resolved(layout: Layout, params: FluxParams) -> Layout:
    """A layout for a transformer of these sizes, by default with FLUX.1-dev's steps and lengths."""
    depths = {"depth": params.depth, "depth_single_blocks": params.depth_single_blocks}
    return layout.resolved(FLUX_DEV._replace(**depths))


def cost(layout: Layout, params: FluxParams, tokens: RegionTokens) -> list[str]:
    """The expected work of the transformer for a resolved layout, compared with plain FLUX.1."""
    found = stages(layout, params, tokens)
    plain = found[-1][1]
    lines = []
    start = total = 0
    for end, flops, what in found:
        if end > start:
            each = f"{amount(flops)} each, {flops / plain:.2f} times a plain step"
            lines.append(f"steps {start + 1} to {end}: {what}, {each}")
        total += (end - start) * flops
        start = end
    more = layout.controlnets or any(region.loras for region in layout.regions)
    note = "; ControlNets and regions' LoRAs come on top" if more else ""
    return [*lines, f"altogether: {amount(total)}, {total / (start * plain):.2f} times plain FLUX.1{note}"]


def amount(flops: int) -> str:
    return f"{flops / 1e12:,.1f} TFLOP" if flops >= 1e12 else f"{flops / 1e9:,.1f} GFLOP"


def stages(layout: Layout, params: FluxParams, tokens: RegionTokens) -> list[tuple[int, int, str]]:
    """Where each stage of equal steps ends, the FLOPs of one of its steps, and its name; the plain steps are last."""
    found = []
    what = "composed of the regions' images" if layout.method == "rpg" else "regional"
    for end, ratio in regional_stages(layout, tokens) if layout.regions else ():
        base = bool(ratio.any())
        name = what if base else f"{what}, no base branch"
        found.append((end, regional_flops(layout, params, tokens, base), name))
    plain = plain_flops(params, layout.max_sequence_length, tokens.cover.shape[1])
    return [*found, (layout.steps, plain, "plain")]


def regional_flops(layout: Layout, params: FluxParams, tokens: RegionTokens, base: bool) -> int:
    """FLOPs of a regional step, with or without the base branch, if attention costs just what the mask allows."""
    length = layout.max_sequence_length
    own = layout.region_max_sequence_length
    image = tokens.cover.shape[1]
    regions = len(tokens.prompts)
    if layout.method == "rpg":
        return regions * plain_flops(params, own, image) + base * plain_flops(params, length, image)
    bits, count = tokens.bits(own).unique(return_counts=True)
    masked = int((allowed(bits[:, None], bits) * count * count[:, None]).sum())
    blocks = params.depth + params.depth_single_blocks
    masked_blocks = len(layout.double_blocks) + len(layout.single_blocks)
    pairs = masked_blocks * masked + (blocks - masked_blocks) * (own * regions + image) ** 2
    pairs += base * blocks * (length + image) ** 2
    streams = 1 + (base and layout.base_stream == "separate")
    return forward_flops(params, own * regions + base * length, image, pairs, streams)


def plain_flops(params: FluxParams, text: int, image: int) -> int:
    return forward_flops(params, text, image, (params.depth + params.depth_single_blocks) * (text + image) ** 2)


def forward_flops(params: FluxParams, text: int, image: int, pairs: int, streams: int = 1) -> int:
    """FLOPs of the transformer for so many text and image tokens and pairs of query and key, over all blocks, with so
    many image streams in the single blocks. Only matrix products count; each multiplication is two, with its addition.
    """
    d, single = params.hidden_size, params.depth_single_blocks
    rows = params.depth * (text + image) + single * (text + streams * image)
    unused = text + (streams - 1) * image  # of the last single block's output
    blocks = rows * (4 * d * d + 2 * d * params.mlp_hidden) + 2 * d * pairs
    blocks -= unused * (d * d + 2 * d * params.mlp_hidden) if single else 0
    ends = text * params.context_in_dim * d + image * (params.in_channels + params.out_channels) * d
    vectors = (12 * params.depth + 3 * single + 2) * d * d  # modulation
    embedders = (1 + params.guidance_embed) * (256 + d) * d + (params.vec_in_dim + d) * d
    return 2 * (blocks + ends + vectors + embedders)
