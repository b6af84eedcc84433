"""Deliberate mistakes in the program, each of which the suite must catch. Run by hand; pytest does not collect this.

python tests/mutations.py          # all of them: some minutes
python tests/mutations.py 1 7      # these alone

The repository is copied to a temporary folder. The tests that are named below first have to pass there; then, for one
mistake after the other, those of the mistake have to fail. The exit code is 0 if all mistakes were caught.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "run", "runs")


class Mistake(NamedTuple):
    """In `file`, `old`, which is there exactly once, becomes `new`. tests: the file that must notice, and which of its
    tests are run, as pytest's -k has it."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, str]


MISTAKES = [
    Mistake("mask rule", "regional/attention.py",
            "(bits_q & bits_k) != 0", "(bits_q | bits_k) != 0",
            ("test_regional.py", "published_code or allowed_keys")),
    Mistake("opacity", "regional/mask.py",
            "cover[i] *= layout.regions[i].opacity", "cover[i] *= 1",
            ("test_regional.py", "opacity")),
    Mistake("opacity where nothing lies below", "regional/mask.py",
            "cover *= opaque / np.where(above > 0, above, 1)", "cover *= 1",
            ("test_regional.py", "opacity")),
    Mistake("mask rule of the kernel", "regional/kernel.py",
            "(bits_q & bits_k) != 0", "(bits_q & bits_k) == bits_q",
            ("test_kernel.py", "line_of_triton")),
    Mistake("tile lists", "regional/kernel.py",
            "(pairs > 0)", "(pairs > 1)",
            ("test_kernel.py", "lists_are_the_mask")),
    Mistake("kernel blend", "regional/kernel.py",
            "(1 - weight) * acc + weight * base_tile", "weight * acc + (1 - weight) * base_tile",
            ("test_kernel.py", "three_heads and float32")),
    Mistake("base_ratio blend", "regional/attention.py",
            "torch.lerp(regional.to(precise), base,", "torch.lerp(base, regional.to(precise),",
            ("test_regional.py", "published_one")),
    Mistake("stage ends", "regional/mask.py",
            "if start >= part.mask_inject_steps", "if start > part.mask_inject_steps",
            ("test_settings.py", "steps_and_ratios")),
    Mistake("feather weights", "regional/mask.py",
            "width / 2 + 0.5 - reach", "width / 2 + 1 - reach",
            ("test_settings.py", "feather")),
    Mistake("RPG composition", "extensions/rpg.py",
            "(cover / cover.sum(0))", "cover",
            ("test_regional.py", "composition")),
    Mistake("RoPE", "model/attention.py",
            "even * cos - odd * sin", "even * cos + odd * sin",
            ("test_model.py", "rope")),
    Mistake("modulation", "model/layers.py",
            "(1 + scale) * F.layer_norm", "scale * F.layer_norm",
            ("test_parity.py", "our_flux")),
    Mistake("RMS norm", "model/layers.py",
            "keepdim=True) + 1e-6", "keepdim=True) + 1e-5",
            ("test_parity.py", "our_flux")),
    Mistake("schedule", "sampler/flow.py",
            "(4096 - 256)", "4096",
            ("test_sampler.py", "schedule")),
    Mistake("Euler step", "sampler/flow.py",
            "(sigmas[step + 1] - t)", "(t - sigmas[step + 1])",
            ("test_sampler.py", "euler")),
    Mistake("DPM++ history", "sampler/flow.py",
            "ratio / 2", "ratio",
            ("test_sampler.py", "diffusers")),
    Mistake("Heun's level", "sampler/flow.py",
            "velocity(ahead, end, step)", "velocity(ahead, t, step)",
            ("test_sampler.py", "diffusers")),
    Mistake("pack order", "sampler/flow.py",
            "-> B (h w) (c ph pw)", "-> B (h w) (ph pw c)",
            ("test_sampler.py", "token_holds")),
    Mistake("T5 buckets", "model/t5.py",
            "half * (relative > 0)", "half * (relative < 0)",
            ("test_parity.py", "our_t5")),
    Mistake("CLIP end token", "model/clip.py",
            "ids.argmax(dim=-1)", "-1",
            ("test_parity.py", "our_clip")),
    Mistake("VAE shift", "model/autoencoder.py",
            "self.params.scale_factor + self.params.shift_factor", "self.params.scale_factor",
            ("test_parity.py", "our_autoencoder")),
    Mistake("LoRA scale", "extensions/lora_files.py",
            "partial(truediv, alpha)", "lambda rank: alpha",
            ("test_lora.py", "kohya")),
    Mistake("LoRA rows", "extensions/lora.py",
            "weight[change.start : change.stop]", "weight[: change.stop - change.start]",
            ("test_lora.py", "diffusers_and_peft")),
    Mistake("steps from an image", "regional/layout.py",
            "int(self.steps - self.steps * denoise)", "int(self.steps * denoise)",
            ("test_image_keys.py", "diffusers_formula")),
    Mistake("noise over an image", "regional/sampling.py",
            "(1 - levels[0]) * conditioning.image", "conditioning.image",
            ("test_image_keys.py", "at_denoise_1")),
    Mistake("what is repainted", "extensions/repaint.py",
            "torch.where(new > 0, velocity.to(line), line)", "velocity.to(line)",
            ("test_image_keys.py", "latents_are_the_images")),
    Mistake("repainted latents", "extensions/repaint.py",
            "torch.nn.functional.max_pool2d(anew, 8)", "anew[..., 4::8, 4::8]",
            ("test_image_keys.py", "latents_are_the_images")),
    Mistake("feather of what is repainted", "extensions/repaint.py",
            "reach = int(area.feather / 2)", "reach = int(area.feather)",
            ("test_image_keys.py", "falls_to_0")),
    Mistake("a region's negative prompt", "extensions/guidance.py",
            "text if prompt is None else prompt for prompt in own", "text for prompt in own",
            ("test_image_keys.py", "region_alone")),
    Mistake("Fill's mask", "extensions/flux_tools.py",
            "(ph pw) h w", "(pw ph) h w",
            ("test_images.py", "diffusers_fill")),
    Mistake("the picture that --decode pastes into", "tools/replay.py",
            "pipeline.decode(latents, layout)", "pipeline.decode(latents)",
            ("test_image_runs.py", "to_the_bit")),
    Mistake("region LoRA leakage", "extensions/region_lora.py",
            "img.all().expand", "img.any().expand",
            ("test_lora.py", "tokens_of_a_region or outside_its_region")),
    Mistake("ControlNet spread", "extensions/controlnet.py",
            "math.ceil(depth / len(own))", "depth // len(own)",
            ("test_controlnet.py", "spread_in_groups")),
    Mistake("FP8 scales", "formats/fp8.py",
            "x.abs().amax(dim=-1, keepdim=True)", "x.abs().amax()[None, None]",
            ("test_fp8.py", "whole_range or near_the_layer")),
    Mistake("GGUF shapes", "formats/gguf.py",
            "tuple(innermost_first[::-1])", "tuple(innermost_first)",
            ("test_gguf.py", "package")),
    Mistake("safetensors offsets", "formats/safetensors.py",
            "data + begin, data + end", "begin, end",
            ("test_weights.py", "both_formats")),
    Mistake("key names", "formats/key_names.py",
            "[Rows(key, half), Rows(key, 0, half)]", "[Rows(key, 0, half), Rows(key, half)]",
            ("test_weights.py", "both_formats")),
    Mistake("hub resume", "formats/hub.py",
            "resume_size=start", "resume_size=0",
            ("test_hub.py", "broke_goes_on or next_run")),
    Mistake("layout checks", "regional/reader.py",
            "require(low < high, key, box", "require(low <= high, key, box",
            ("test_layout.py", "mistake")),
    Mistake("overrides", "regional/reader.py",
            "data |= overrides", "data = overrides | data",
            ("test_layout.py", "command_line")),
    Mistake("presets", "regional/reader.py",
            "if key not in data}", "}",
            ("test_settings.py", "preset")),
    Mistake("style", "regional/layout.py",
            ", style=\"\")", ")",
            ("test_layout.py", "style")),
    Mistake("ellipses", "regional/mask.py",
            "** 2 < ((x1 - x0)", "** 2 < 2 * ((x1 - x0)",
            ("test_settings.py", "ellipse")),
    Mistake("order", "regional/mask.py",
            "-layout.regions[i].order", "layout.regions[i].order",
            ("test_settings.py", "order")),
    Mistake("layouts in code", "regional/reader.py",
            "if value != unset[key]}", "}",
            ("test_layout.py", "in_code or pipeline")),
    Mistake("metadata", "tools/metadata.py",
            "image.info.get(\"layout\") or", "",
            ("test_batch.py", "reproduced_from")),
    Mistake("resume decision", "tools/compare.py",
            "if not changed and is_whole", "if is_whole",
            ("test_batch.py", "of_other_settings")),
    Mistake("names", "tools/jobs.py",
            "has_seeds and \"{seed}\" not in", "has_seeds and \"{seed}\" in",
            ("test_batch.py", "template")),
    Mistake("shards", "tools/jobs.py",
            "int(index) < int(count)", "int(index) <= int(count)",
            ("test_batch.py", "makes_no_sense")),
    Mistake("sweeps", "tools/sheets.py",
            "key.strip().replace(\"-\", \"_\")", "key.strip()",
            ("test_batch.py", "sweep_makes")),
    Mistake("preview", "tools/preview.py",
            "phase >= enlarged", "phase <= enlarged",
            ("test_preview.py", "striped")),
    Mistake("convert", "tools/convert.py",
            "[x0 / w, x1 / w, y0 / h, y1 / h", "[x0 / w, y0 / h, x1 / w, y1 / h",
            ("test_convert.py", "forge")),
    Mistake("imported graph", "tools/importers/comfyui.py",
            'if key != "negative"', 'if key != "positive"',
            ("test_importers.py", "workflow or negative")),
    Mistake("imported drawing", "tools/importers/svg.py",
            "large != sweep", "large == sweep",
            ("test_importers.py", "curves")),
    Mistake("plan", "tools/plan.py",
            ".min() > 1", ".max() > 1",
            ("test_plan.py", "overlap_in_part")),
    Mistake("schema", "tools/schema.py",
            "\"mask\": {\"string\": {\"minLength\": 1}},", "",
            ("test_preview.py", "reader_and_schema_agree")),
    Mistake("offload order", "runtime/offload.py",
            "if index != self.fetched", "if self.fetched is None",
            ("test_offload.py", "out_of_turn")),
    Mistake("Ulysses exchange", "runtime/ulysses.py",
            "pieces[rank :: self.size]", "pieces[self.rank :: self.size]",
            ("test_ulysses.py", "several_processes")),
]  # fmt: skip


def failing_test(folder: Path, file: str, words: str) -> str:
    """The test that fails first, "" if none does. RuntimeError if pytest found no test, or crashed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", "-n", "0"]
    command += [f"tests/{file}", "-k", words]
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if done.returncode else ""


def check_texts(mistakes: list[Mistake]) -> None:
    counts = [(m, (ROOT / m.file).read_text(encoding="utf-8").count(m.old)) for m in mistakes]
    wrong = [f"{m.what}: {m.old!r} is {count} times in {m.file}" for m, count in counts if count != 1]
    if wrong:
        raise ValueError("expected each text once:\n" + "\n".join(wrong))


def is_caught(mistake: Mistake, folder: Path) -> bool:
    path = folder / mistake.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mistake.old, mistake.new), encoding="utf-8")
    start = time.monotonic()
    failed = failing_test(folder, *mistake.tests)
    path.write_text(text, encoding="utf-8")
    verdict = f"caught, {failed}" if failed else f"SURVIVED {' -k '.join(mistake.tests)}"
    print(f"{verdict} ({time.monotonic() - start:.0f} s)", flush=True)
    return bool(failed)


def main(argv: list[str]) -> int:
    numbers = [int(number) for number in argv] or list(range(1, len(MISTAKES) + 1))
    chosen = [MISTAKES[number - 1] for number in numbers]
    check_texts(chosen)
    survived = []
    with tempfile.TemporaryDirectory(prefix="mutations") as made:
        folder = Path(made) / "repository"
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        for file in dict.fromkeys(mistake.tests[0] for mistake in chosen):
            words = " or ".join(f"({m.tests[1]})" for m in chosen if m.tests[0] == file)
            if failed := failing_test(folder, file, words):
                raise RuntimeError(f"without any mistake: {failed}")
        for number, mistake in zip(numbers, chosen):
            print(f"{number:2} {mistake.what}: ", end="", flush=True)
            if not is_caught(mistake, folder):
                survived.append(number)
    caught = len(chosen) - len(survived)
    print(f"{caught} of {len(chosen)} mistakes are caught; survivors: {survived or 'none'}")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
