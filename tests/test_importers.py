"""Layouts from files of ComfyUI, A1111, Forge, InvokeAI and from SVG drawings."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, PngImagePlugin

from regional.mask import region_tokens
from regional.reader import read_layout
from tools.convert import main


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def png(name: str, **texts) -> None:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text if isinstance(text, str) else json.dumps(text))
    Image.new("RGB", (128, 64)).save(name, "PNG", pnginfo=info)


def layout_of(form: str, content=None, name: str = "in", **texts) -> dict:
    """What the form's file becomes, in YAML; a PNG of these texts if there are any."""
    if texts:
        png(name, **texts)
    else:
        Path(name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert main(f"--from {form} {name} layout.yaml --overwrite".split()) == 0
    read_layout("layout.yaml", {})
    return yaml.safe_load(Path("layout.yaml").read_text())


# ------------------------------------------------------------------------------ ComfyUI


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def text(words: str) -> dict:
    return node("CLIPTextEncode", text=words, clip=["model", 1])


def workflow(**more) -> dict:
    """A town, drawn by a KSampler, in the API's form."""
    return {
        "model": node("CheckpointLoaderSimple", ckpt_name="flux1-dev.safetensors"),
        "base": text("a town"), "no": text("ugly"), "tree": text("a tree"), "house": text("a house"),
        "guided": node("FluxGuidance", guidance=4.5, conditioning=["base", 0]),
        "empty": node("EmptySD3LatentImage", width=128, height=64, batch_size=1),
        "sampler": node("KSampler", seed=7, steps=20, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1,
                        model=["model", 0], positive=["guided", 0], negative=["no", 0], latent_image=["empty", 0]),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["model", 2]),
    } | more  # fmt: skip


def as_drawn(nodes: dict, widgets: dict) -> dict:
    """The same as the menu's "Save" writes it; widgets: by type, the order of its values."""
    numbers = {name: i for i, name in enumerate(nodes, 1)}
    links, drawn = [], []
    for name, each in nodes.items():
        sockets = []
        for key, value in each["inputs"].items():
            if isinstance(value, list):
                links.append([len(links) + 10, numbers[value[0]], value[1], numbers[name], len(sockets), "X"])
                sockets.append({"name": key, "type": "X", "link": links[-1][0]})
        values = [each["inputs"].get(key, "randomize") for key in widgets.get(each["class_type"], "").split()]
        kind = each["class_type"]
        drawn.append({"id": numbers[name], "type": kind, "mode": 0, "inputs": sockets, "widgets_values": values,
                      "outputs": [{"name": "X", "type": "X", "links": []}]})  # fmt: skip
    return {"nodes": drawn, "links": links, "version": 0.4}


ORDER = {
    "CLIPTextEncode": "text", "FluxGuidance": "guidance", "EmptySD3LatentImage": "width height batch_size",
    "KSampler": "seed control_after_generate steps cfg sampler_name scheduler denoise", "INTConstant": "value",
    "FluxRegionBBOX": "x1 y1 x2 y2", "SetNode": "name", "GetNode": "name", "SolidMask": "value width height",
}  # fmt: skip
TOWN = {"prompt": "a town", "width": 128, "height": 64, "steps": 20, "guidance": 4.5, "seed": 7, "regions": []}
TREE, HOUSE = {"prompt": "a tree", "strength": 1}, {"prompt": "a house", "strength": 1}


def positive(*regions: str, **nodes) -> dict:
    """The workflow with regions beside the base prompt, from the nodes of these names."""
    nodes["with0"] = node("ConditioningCombine", conditioning_1=["guided", 0], conditioning_2=[regions[0], 0])
    for i, region in enumerate(regions[1:], 1):
        nodes[f"with{i}"] = node("ConditioningCombine", conditioning_1=[f"with{i - 1}", 0], conditioning_2=[region, 0])
    nodes = workflow(**nodes)
    nodes["sampler"]["inputs"]["positive"] = [f"with{len(regions) - 1}", 0]
    return nodes


def bboxes(**more) -> dict:
    """attashe's FluxRegionAttention: fractions x1, y1, x2, y2."""
    nodes = workflow(
        one=node("FluxRegionBBOX", x1=0.0, y1=0.0, x2=0.5, y2=1.0, condition=["tree", 0]),
        two=node("FluxRegionMask", mask=["white", 0], condition=["house", 0]),
        white=node("SolidMask", value=1.0, width=128, height=64),
        apply=node("RegionAttention", model=["model", 0], condition=["guided", 0], samples=["empty", 0],
                   region1=["one", 0], region2=["two", 0], enabled=True), **more)  # fmt: skip
    nodes["sampler"]["inputs"] |= {"model": ["apply", 0], "positive": ["apply", 1]}
    return nodes


def shape(x: int, slot: int, name: str, **before) -> dict:
    """logtd's Fluxtapoz: masks are black inside, here KJNodes' inverted ones; 64 x 64 for the whole image."""
    made = node("CreateShapeMask", shape="square", frames=1, location_x=x, location_y=32, grow=0,
                frame_width=64, frame_height=64, shape_width=32, shape_height=64)  # fmt: skip
    return {name: made, f"{name}-region": node("CreateRegionalCond", cond=[name[:-1], 0], mask=[name, slot], **before)}


def fluxtapoz() -> dict:
    nodes = workflow(
        **shape(16, 1, "tree1"), **shape(48, 0, "house1", prev_regions=["tree1-region", 0]),
        blocks=node("FluxAttnOverride", double_blocks="0,2, 4", single_blocks=""),
        apply=node("ApplyRegionalConds", model=["model", 0], region_conds=["house1-region", 0], latent=["empty", 0],
                   attn_override=["blocks", 0], start_percent=0, end_percent=0.3),
        guider=node("BasicGuider", model=["apply", 0], conditioning=["guided", 0]),
        steps=node("BasicScheduler", scheduler="simple", steps=20, denoise=1, model=["apply", 0]),
        noise=node("RandomNoise", noise_seed=7), euler=node("KSamplerSelect", sampler_name="euler"),
        sampler=node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["euler", 0],
                     sigmas=["steps", 0], latent_image=["empty", 0]))  # fmt: skip
    return nodes


LEFT, RIGHT = [0, 0, 64, 64], [64, 16, 128, 64]
ROWS = {"left": ["0%", "0%", "50%", "100%"], "right": ["50%", "25%", "100%", "100%"]}
AREAS = positive(
    "left", "right",
    left=node("ConditioningSetArea", x=0, y=0, width=64, height=64, strength=1.0, conditioning=["tree", 0]),
    right=node("ConditioningSetAreaPercentage", x=0.5, y=0.25, width=0.5, height=0.75, strength=2.0,
               conditioning=["house", 0]))  # fmt: skip
SOLID = dict(
    black=node("SolidMask", value=0.0, width=128, height=64), part=node("SolidMask", value=1.0, width=64, height=48),
    both=node("MaskComposite", x=64, y=16, operation="add", destination=["black", 0], source=["part", 0]),
    other=node("InvertMask", mask=["both", 0]),
)  # fmt: skip
MASKS = positive(
    "in", "out", "file", **SOLID, scan=node("LoadImageMask", image="scan.png", channel="red"),
    **{"in": node("ConditioningSetMask", strength=1.5, mask=["both", 0], conditioning=["house", 0])},
    out=node("ConditioningSetMask", mask=["other", 0], conditioning=["tree", 0]),
    file=node("ConditioningSetMask", mask=["scan", 0], conditioning=["tree", 0]))  # fmt: skip
RING = [[64, 16], [128, 16], [128, 64], [64, 64]]
FULL = [[0, 0], [128, 0], [128, 64], [0, 64]]
COMFY = TOWN | {"schedule": "simple"}
WORKFLOWS = {
    "plain": (workflow(), COMFY),
    "areas": (AREAS, COMFY | {"regions": [TREE | {"box": [0, 0, 64, 64]}, HOUSE | {"box": RIGHT, "strength": 2}]}),
    "masks": (MASKS, COMFY | {"regions": [
        HOUSE | {"box": RIGHT, "strength": 1.5}, TREE | {"polygon": [FULL, RING]}, TREE | {"mask": "layout.2.png"}]}),
    "FluxRegionAttention": (bboxes(), COMFY | {"regions": [
        TREE | {"box": LEFT}, HOUSE | {"box": [0, 0, 128, 64]}]}),
    "Fluxtapoz": (fluxtapoz(), COMFY | {"double_blocks": [0, 2, 4], "single_blocks": [], "regions": [
        TREE | {"box": LEFT}, HOUSE | {"polygon": [FULL, [[64, 0], [128, 0], [128, 64], [64, 64]]]}]}),
}  # fmt: skip


@pytest.mark.parametrize("nodes, expected", WORKFLOWS.values(), ids=WORKFLOWS)
def test_a_workflow_is_read_from_its_export_and_from_a_picture(nodes, expected):
    Image.new("L", (128, 64), 255).save("scan.png")
    assert layout_of("comfyui", nodes) == expected
    is_changed = {"sampler": nodes["sampler"] | {"is_changed": [float("nan")]}}
    assert layout_of("comfyui", prompt=nodes | is_changed, workflow="{}") == expected


def test_a_saved_workflow_is_read_through_variables_constants_and_bypassed_nodes():
    nodes = bboxes(
        width=node("INTConstant", value=128), store=node("SetNode", name="W", INT=["width", 0]),
        load=node("GetNode", name="W"),
        dull=node("FluxGuidance", guidance=9.0, conditioning=["guided", 0]))  # fmt: skip
    nodes["empty"]["inputs"]["width"] = ["load", 0]
    nodes["apply"]["inputs"]["condition"] = ["dull", 0]
    graph = as_drawn(nodes, ORDER)
    by_type = {each["type"]: each for each in graph["nodes"] if each["widgets_values"] != [4.5]}
    by_type["FluxGuidance"]["mode"] = 4
    by_type["EmptySD3LatentImage"]["widgets_values"][0] = 512  # what it was before it was linked
    assert layout_of("comfyui", graph) == WORKFLOWS["FluxRegionAttention"][1]
    by_type["FluxGuidance"]["mode"] = 0
    assert layout_of("comfyui", workflow=graph, name="in.png")["guidance"] == 9
    by_type["FluxRegionBBOX"]["mode"] = 2
    assert [region["prompt"] for region in layout_of("comfyui", graph)["regions"]] == ["a house"]


def test_of_several_samplers_the_first_counts_and_what_is_lost_is_said(capsys):
    nodes = positive("left", **{"left": node("ConditioningSetMask", mask=["odd", 0], conditioning=["tree", 0])},
                     odd=node("MaskFromClouds", seed=1), lora=node("LoraLoader", lora_name="x", model=["model", 0]),
                     other=node("MyRegionNode", conditioning=["house", 0]))  # fmt: skip
    nodes["sampler"]["inputs"] |= {"cfg": 3.5, "sampler_name": "res_2s", "model": ["lora", 0]}
    first = nodes["sampler"]["inputs"]
    second = node("KSampler", **first | {"latent_image": ["sampler", 0], "steps": 5, "seed": 99, "denoise": 0.4})
    nodes = {"second": second} | nodes
    nodes["base"] = text("(a (red:1.2) town:1.3) <lora:x:1>")
    found = layout_of("comfyui", nodes)
    assert (found["prompt"], found["steps"], found["seed"], found["regions"]) == ("a red town", 20, 7, [])
    assert (found["negative_prompt"], found["true_cfg_scale"]) == ("ugly", 3.5)
    err = capsys.readouterr().err
    lost = ["sampler res_2s", "LoraLoader", "the region of MaskFromClouds, a tree", "MyRegionNode"]
    assert all(f" {words}" in err for words in [*lost, "(red:1.2)", "<lora:x:1>"]) and "denoise" not in err


def test_masks_are_put_together_and_negative_conditionings_count_for_nothing():
    parts = SOLID | {"white": node("SolidMask", value=1.0, width=128, height=64)}
    hole = parts["both"]["inputs"] | {"operation": "subtract", "destination": ["white", 0]}
    holes = positive("in", **parts | {"both": node("MaskComposite", **hole)}, **{
        "in": node("ConditioningSetMask", mask=["both", 0], conditioning=["tree", 0])})  # fmt: skip
    holes["guided"] = text("a town")
    holes["sampler"]["inputs"]["negative"] = ["much", 0]
    holes["much"] = node("FluxGuidance", guidance=9.0, conditioning=["no", 0])
    expected = {key: value for key, value in COMFY.items() if key != "guidance"}
    assert layout_of("comfyui", holes) == expected | {"regions": [TREE | {"polygon": [FULL, RING]}]}
    holes["both"]["inputs"]["operation"] = "multiply"
    assert layout_of("comfyui", holes) == expected


# ------------------------------------------------------------------------------ pictures of others

LINE = "Steps: 20, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: 4.5, Seed: 7, Size: 128x64, Model: flux1-dev"
COUPLE = LINE + r", forge_couple: True, forge_couple_separator: \n, forge_couple_mode: "
MAPPING = json.dumps(json.dumps([[0, 1, 0, 1, 1], [0, 0.5, 0, 1, 1.5], [0.5, 1, 0.25, 1, 1]]))
BASIC = "Basic, forge_couple_direction: {}, forge_couple_background: {}"
ROW = [TREE | {"box": ROWS["left"]}, HOUSE | {"box": ["50%", "0%", "100%", "100%"]}]
COLUMN = [TREE | {"box": ["0%", "0%", "100%", "50%"]}, HOUSE | {"box": ["0%", "50%", "100%", "100%"]}]
THREE = "a town\na tree\na house"
PARAMETERS = {
    f"a town\nNegative prompt: ugly,\nold\n{LINE}": [],
    f"a (town:1.2) <lora:x:0.8>\n{LINE}, Note: \"Seed: 9, \\\"Steps\\\"\"": [],
    f"{THREE}\nNegative prompt: ugly\n{COUPLE}Advanced, forge_couple_mapping: {MAPPING}": [
        TREE | {"box": ROWS["left"], "strength": 1.5}, HOUSE | {"box": ROWS["right"]}],
    f"{THREE}\n{COUPLE}{BASIC.format('Horizontal', 'First Line')}": ROW,
    f"a tree\na house\na town\n{COUPLE}{BASIC.format('Vertical', 'Last Line')}": COLUMN,
}  # fmt: skip


@pytest.mark.parametrize("parameters, regions", PARAMETERS.items())
def test_parameters_are_read_from_a_picture_and_from_text(parameters, regions):
    expected = TOWN | {"regions": regions}
    if "Negative prompt:" in parameters:
        expected["negative_prompt"] = "ugly,\nold" if "old" in parameters else "ugly"
    assert layout_of("a1111", parameters=parameters, name="in.png") == expected
    assert layout_of("forge", parameters=parameters, name="in.png") == expected
    assert layout_of("a1111", parameters) == expected


def test_what_parameters_have_beyond_a_layout_is_said(capsys):
    found = layout_of("a1111", f"a town\nNegative prompt: ugly\n{LINE.replace('Euler', 'DPM++ 2M')}, Hires steps: 5")
    err = capsys.readouterr().err
    assert "dpmpp_2m" in err + str(found) and "Hires steps 5, Model flux1-dev\n" in err
    assert found["negative_prompt"] == "ugly" and "true_cfg_scale" not in found


@pytest.mark.parametrize("scale, kept", [("1", None), ("2.5", 2.5), ("0", None)])
def test_negative_prompts_come_along_and_the_cfg_scales_of_flux(scale, kept, capsys):
    """Those of other models would be too high for it."""
    line = LINE.replace("CFG scale: 1", f"CFG scale: {scale}", 1)
    for of_flux in True, False:
        settings = line if of_flux else line.replace("Distilled CFG Scale: 4.5, ", "")
        found = layout_of("a1111", f"a town\nNegative prompt: (ugly:1.2)\n{settings}")
        assert found["negative_prompt"] == "ugly"
        assert found.get("true_cfg_scale") == (kept if of_flux else None)
        assert ("cfg 2.5" in capsys.readouterr().err) == (scale == "2.5" and not of_flux)
    metadata = INVOKE | {"negative_prompt": "ugly", "cfg_scale": float(scale)}
    found = layout_of("invokeai", invokeai_metadata=metadata, name="in.png")
    assert (found["negative_prompt"], found.get("true_cfg_scale")) == ("ugly", kept)
    nodes = workflow()
    nodes["sampler"]["inputs"]["cfg"] = float(scale)
    found = layout_of("comfyui", nodes)
    assert (found.get("negative_prompt"), found.get("true_cfg_scale")) == ("ugly" if scale != "1" else None, kept)


def test_a_picture_of_this_program_is_read_as_others_are():
    from tools.metadata import embedded

    metadata = {"model": "pocket", "base_ratio": 0.3, "mask_inject_steps": "40%", **TOWN}
    info = embedded(metadata, ".png")["pnginfo"]
    Image.new("RGB", (128, 64)).save("own.png", pnginfo=info)
    assert main("--from a1111 own.png layout.yaml".split()) == 0
    assert yaml.safe_load(Path("layout.yaml").read_text()) == TOWN


INVOKE = {"positive_prompt": "a town", "width": 128, "height": 64, "steps": 20, "guidance": 4.5, "seed": 7}


def test_invokeais_pictures_are_read_and_its_own_form_still_is(capsys):
    layer = {"isEnabled": True, "positivePrompt": "a tree", "objects": []}
    lost = {"negative_prompt": "ugly", "cfg_scale": 1, "loras": [{"weight": 1}], "scheduler": "lcm"}
    expected = TOWN | {"negative_prompt": "ugly"}
    metadata = INVOKE | lost | {"canvas_v2_metadata": {"regionalGuidance": [layer]}}
    assert layout_of("invokeai", invokeai_metadata=metadata, name="in.png") == expected
    err = capsys.readouterr().err
    assert "sampler lcm" in err and "no place for loras, the regional layers" in err
    del metadata["width"], metadata["height"]
    assert layout_of("invokeai", invokeai_metadata=metadata, name="in.png") == expected  # the picture's size


# ------------------------------------------------------------------------------ SVG

HEAD = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:i="http://www.inkscape.org/namespaces/inkscape"'


def drawing(*parts: str, size: str = 'width="128" height="64"') -> str:
    return f"<?xml version='1.0'?><!-- x -->{HEAD} {size}><title>a town</title>{''.join(parts)}</svg>"


def bits_of(content: str, options: str = "") -> list[list[int]]:
    """The first region's tokens, in rows."""
    Path("in.svg").write_text(content)
    assert main(f"--from svg in.svg layout.yaml --overwrite {options}".split()) == 0
    layout = read_layout("layout.yaml", {})
    bits = np.array(region_tokens(layout).image_bits.tolist()).reshape(layout.height // 16, -1) & 1
    return bits.tolist()


TREE_BOX = {"prompt": "a tree", "box": [16, 16, 64, 48]}
BOXES = [  # the same box in other words
    '<rect id="a_tree" x="16" y="16" width="48" height="32"/>',
    '<g i:label="a tree"><rect id="rect12" x="16" y="16" width="48px" height="32"/></g>',
    '<g id="layer1"><path d="m16 16h48V48H16z"><title>a tree</title></path></g>',
    '<g transform="translate(16 16)" id="g7"><g transform="scale(16, 8)"><rect aria-label="a tree"'
    ' width="3" height="4"/></g></g>',
    '<polygon id="a_tree" points="16,16 64 16,64 48 16,48"/>',
    '<rect id="a tree" transform="rotate(90 16 16)" x="16" y="-32" width="32" height="48"/>',
    '<rect id="a tree" transform="matrix(0 1 -1 0 64 16) skewX(0)" width="32" height="48"/>',
]


@pytest.mark.parametrize("part", BOXES)
def test_a_rectangle_is_a_box_whatever_it_is_written_as(part):
    expected = {"prompt": "a town", "width": 128, "height": 64, "overlap": "last", "regions": [TREE_BOX]}
    assert layout_of("svg", drawing(part)) == expected


def area(content: str) -> float:
    """Of the first region's outlines, holes subtracted."""
    layout = layout_of("svg", content)
    total = 0
    for ring in layout["regions"][0]["polygon"]:
        x, y = np.array(ring).T
        total += (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2
    return abs(total)


CURVES = {  # the area that calculus gives
    '<circle id="x y" cx="64" cy="32" r="30"/>': np.pi * 900,
    '<ellipse id="x y" cx="64" cy="32" rx="60" ry="20" transform="rotate(7 64 32)"/>': np.pi * 1200,
    '<path id="x y" d="M34 32a30 30 0 0 1 60 0A30 30 0 0 1 34 32Z"/>': np.pi * 900,
    '<path id="x y" d="M34,32a30 30 0 11 60 0 30 30 0 01-60 0z"/>': np.pi * 900,
    '<path id="x y" d="M64 2A30 30 0 1 0 94 32L64 32z"/>': np.pi * 900 * 3 / 4,
    '<path id="x y" d="M64 2a30 30 0 0 1 30 30H64z"/>': np.pi * 900 / 4,
    '<path id="x y" d="M0 60Q30 -60 60 60z"/>': 60 * 120 / 3,
    '<path id="x y" d="M0 32q15 -30 30 0t30 0V60H0z"/>': 60 * 28,
    '<path id="x y" d="M0 60C0 20 60 20 60 60z"/>': 60 * 40 * 0.6,
    '<path id="x y" d="M0 32c0 0 30 -30 30 0s30 0 30 0V60H0z"/>': 60 * 28,
    '<path id="x y" d="M34 32a30 30 0 0 1 60 0a30 30 0 0 1-60 0M44 32a20 20 0 0 0 40 0a20 20 0 0 0-40 0"/>':
        np.pi * 500,
}  # fmt: skip


@pytest.mark.parametrize("part, expected", CURVES.items())
def test_curves_enclose_the_area_that_calculus_gives(part, expected):
    assert area(drawing(part)) == pytest.approx(expected, rel=0.03)


def test_a_group_is_one_region_later_shapes_lie_on_top_and_what_is_not_read_is_said(capsys):
    group = '<g i:label="trees"><circle r="9"/><path d="M50 0h9v9z"/><rect id="a_hut" width="9" height="9"/></g>'
    hidden = '<g style="display: none"><rect id="x" width="9"/></g><defs><rect id="y" width="9"/></defs>'
    found = layout_of("svg", drawing(group, hidden, '<rect id="rect3" x="50" width="9" height="9"/><text>a</text>'))
    kinds = [(region["prompt"], len(region.get("polygon", []))) for region in found["regions"]]
    assert kinds == [("trees", 2), ("a hut", 0), ("rect3", 0)]
    err = capsys.readouterr().err
    assert "no place for text" in err and "need a prompt: rect3" in err and "overlap" not in err
    layout_of("svg", drawing(group.replace('"9"', '"30"').replace("M50", "M9")))
    assert "regions[0].polygon: its polygons overlap" in capsys.readouterr().err


SIZES = {
    'width="2in" height="1in" viewBox="0 0 40 20"': ([48, 24, 96, 48], 192),
    'width="100%" viewBox="10 5 64 32"': ([0, 0, 10, 5], 64),
    'width="64" height="64" viewBox="0 0 40 20"': ([16, 24, 32, 32], 64),
    'width="64" height="64" viewBox="0 0 40 20" preserveAspectRatio="none"': ([16, 16, 32, 32], 64),
}


def test_the_view_box_is_scaled_to_the_size_of_the_drawing_or_the_flags():
    sun = '<rect id="the sun" x="10" y="5" width="10" height="5"/>'
    for size, (box, width) in SIZES.items():
        found = layout_of("svg", drawing(sun, size=size))
        assert (found["regions"][0]["box"], found["width"]) == (box, width)
    assert main("--from svg in layout.yaml --overwrite --size 640 640".split()) == 0
    found = read_layout("layout.yaml", {})
    assert (found.regions[0].box, found.width) == ((160, 160, 320, 320), 640)


# ------------------------------------------------------------------------------ mistakes


def bad(**more) -> str:
    return json.dumps(workflow(**more))


ODD = {"one": node("FluxRegionBBOX", x1="left", y1=0, x2=1, y2=1, condition=["tree", 0])}
LOOP = {"empty": node("EmptySD3LatentImage", width=["a", 0], height=64), "a": node("X", value=["a", 0])}
MISTAKES = [
    ("comfyui", "{", "damaged JSON"),
    ("comfyui", "[" * 100_000, "damaged JSON"),
    ("comfyui", '{"nodes": [{"id": 1}], "links": []}', "missing required field `type` - at `$.nodes[0]`"),
    ("comfyui", '{"1": {"class_type": 5}}', "Expected `str`, got `int`"),
    ("comfyui", "{}", "no node in it has a latent_image"),
    ("comfyui", json.dumps(positive("one", **ODD)), "one.x1 = 'left': expected a number"),
    ("comfyui", bad(**LOOP), "--size: needed, because"),
    ("comfyui", json.dumps(positive("one", one=node("ConditioningSetMask", mask=["m", 0], conditioning=["tree", 0]),
                                    m=node("InvertMask", mask=["m", 0]))), "cannot be read as comfyui"),
    ("comfyui", json.dumps(positive("one", one=node("ConditioningSetMask", mask=["m", 0], conditioning=["tree", 0]),
                                    m=node("LoadImageMask", image="no.png", channel="red"))), "mask = no.png: there"),
    ("comfyui", bad(base=text("a " * 200_000)), "bytes for a layout"),
    ("comfyui", bad(guided=node("FluxGuidance", guidance="much", conditioning=["base", 0])), "guidance = 'much': exp"),
    ("a1111", "a town", "has no parameters"),
    ("a1111", f"a town\n{LINE}".replace("7", "seven"), "damaged JSON"),
    ("a1111", f"{THREE}\n{COUPLE}Advanced, forge_couple_mapping: {MAPPING[:30]}", "damaged JSON"),
    ("a1111", f"{THREE}\n{COUPLE}Advanced, forge_couple_mapping: \"[[0, 1, 0, 2, 1]]\"", "Expected `float` <= 1.0"),
    ("a1111", f"a\n{COUPLE}Advanced, forge_couple_mapping: {MAPPING}", "mapping: 3 boxes, for 1 prompts"),
    ("svg", "no", "damaged XML"),
    ("svg", '<!DOCTYPE svg [<!ENTITY a SYSTEM "/etc/passwd">]><svg>&a;</svg>', "document types are not read"),
    ("svg", "<svg>&a;</svg>", "undefined entity"),
    ("svg", "<svg>" + "<g>" * 110_000, "more than 50,000 elements"),
    ("svg", "<svg width='9' height='9'>" + "<g>" * 40_000 + "</g>" * 40_000 + "</svg>", "recursion"),
    ("svg", drawing('<rect id="sun" width="50%" height="9"/>'), "width = '50%': expected a length"),
    ("svg", drawing('<rect id="sun" width="1e9" height="9"/>'), "width = 1000000000.0: expected a number"),
    ("svg", drawing('<path id="sun" d="M0 0L1e999 3 4 5"/>'), "sun = inf: expected a number"),
    ("svg", drawing('<g transform="scale(1)">' * 100, "</g>" * 100), "nested too deeply"),
    ("svg", drawing('<path id="sun" d="M0 0', "l1 1" * 30_000, '"/>'), "more points than a layout can"),
    ("svg", f"{HEAD}/>", "cannot be read as svg"),
]  # fmt: skip


@pytest.mark.parametrize("form, content, words", MISTAKES)
def test_a_mistake_gets_one_sentence_that_names_the_file(form, content, words, capsys):
    Path("in.txt").write_text(content)
    assert main(f"--from {form} in.txt layout.yaml".split()) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("convert: in.txt: ") and sentence.endswith(".") and words in sentence, sentence
    assert not Path("layout.yaml").exists()


def test_a_picture_without_what_is_looked_for_is_named(capsys):
    png("in.png", parameters="a town", prompt="{}")
    Image.new("RGB", (8, 8)).save("empty.png")
    words = {
        "comfyui in.png": "latent_image",
        "comfyui empty.png": "no workflow",
        "a1111 in.png": "no parameters",
        "invokeai in.png": "no metadata",
        "forge empty.png": "no parameters",
        "svg in.png": "cannot be read",
    }
    for command, problem in words.items():
        assert main(f"--from {command} layout.yaml".split()) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and problem in err and command.split()[1] in err
