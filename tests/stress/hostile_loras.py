"""Convert hostile and odd LoRA files: each must become a sound file or be refused in one sentence.

    python tests/stress/hostile_loras.py

Each file is made in a temporary folder and given to `sketch-perceptual convert`. Right is exit 0 and an output
with finite weights and as many modules as the file has, or exit 2 with one sentence, no traceback and no output.
Prints a line for each, exits with 1 if any is wrong.

Right on 2026-11-30: 139 of 139, of which 24 are read and 115 refused.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save, save_file

from sketch_perceptual.commands.convert import main as convert_lora
from sketch_perceptual.lora import files as lora_files

BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
QUERY, KEY, OUT = (f"{BLOCK}_attn1_to_{name}" for name in ("q", "k", "out_0"))
CONV = "lora_unet_down_blocks_0_resnets_0_conv2"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
PEFT = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight"
DIFFUSERS = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.{}.weight"
METADATA = "lora_adapter_metadata"

Make = Callable[[Path], None]
CASES: dict[str, tuple[int, Make]] = {}  # name -> modules that must come out (0: refused), and what makes the file


def lora(module: str = QUERY, down=(4, 320), up=(320, 4), **parts: torch.Tensor) -> dict[str, torch.Tensor]:
    """A LoRA of one module; `parts` replace or extend its tensors, with dots as double underscores."""
    rng = torch.Generator().manual_seed(0)
    tensors = {"lora_down.weight": torch.randn(down, generator=rng), "lora_up.weight": torch.randn(up, generator=rng)}
    tensors |= {name.replace("__", "."): tensor for name, tensor in parts.items()}
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}


def add(name: str, modules: int, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    CASES[name] = modules, lambda path: save_file(tensors, path, metadata)


def add_bytes(name: str, content: bytes) -> None:
    CASES[name] = 0, lambda path: path.write_bytes(content) and None


def add_made(name: str, modules: int = 0) -> Callable[[Make], Make]:
    """Register the function that makes a file, or something else, at a path."""

    def register(make: Make) -> Make:
        CASES[name] = modules, make
        return make

    return register


def with_header(header: bytes, data: bytes = b"\0" * 64) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: str = "F32", shape=(4, 4), offsets=(0, 64)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def header(**entries: object) -> bytes:
    return with_header(json.dumps(entries).encode())


WHOLE = save(lora())

# Files that are damaged or something else.
add_bytes("empty", b"")
add_bytes("seven bytes", b"\1\2\3\4\5\6\7")
add_bytes("truncated in the header", WHOLE[:60])
add_bytes("truncated in the data", WHOLE[:-100])
add_bytes("bytes behind the data", WHOLE + b"x" * 100)
add_bytes("header longer than the file", (2**40).to_bytes(8, "little") + WHOLE[8:])
add_bytes("header of length 0", (0).to_bytes(8, "little") + WHOLE[8:])
add_bytes("header that is not JSON", with_header(b"{" * 200))
add_bytes("header that is a list", with_header(b"[1, 2]"))
add_bytes("header that is not UTF-8", with_header(b'{"\xff\xfe": 1}'))
add_bytes("nested header", with_header(b"[" * 50_000))
add_bytes("offsets beyond the file", header(**{f"{QUERY}.lora_down.weight": entry(offsets=(0, 10**12))}))
add_bytes("negative offsets", header(**{f"{QUERY}.lora_down.weight": entry(offsets=(-64, 0))}))
add_bytes("shape that does not fit the data", header(**{f"{QUERY}.lora_down.weight": entry(shape=(999, 999))}))
add_bytes("shape that overflows", header(**{f"{QUERY}.lora_down.weight": entry(shape=(2**62, 2**62, 0))}))
add_bytes("unknown dtype", header(**{f"{QUERY}.lora_down.weight": entry("F3")}))
for dtype, size in (("F4", 8), ("F8_E8M0", 16), ("F8_E4M3FNUZ", 16), ("U16", 32)):
    tensors = {
        f"{QUERY}.lora_down.weight": entry(dtype, offsets=(0, size)),
        f"{QUERY}.lora_up.weight": entry(dtype, offsets=(size, 2 * size)),
    }
    add_bytes(f"weights of {dtype}", header(**tensors)[: size * 2 - 64 or None])
add_bytes("metadata that is a number", header(__metadata__=1, x=entry()))
add_bytes("metadata with a list", header(__metadata__={"a": [1]}, x=entry()))
add_bytes("a pickle", b"\x80\x02}q\x00.")
add_bytes("a zip of torch.save", b"PK\x03\x04" + b"\0" * 100)
add_bytes("GGUF", b"GGUF" + b"\0" * 100)
add_bytes("a web page", b"<!DOCTYPE html><html>404</html>")
add_bytes("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
add_bytes("zeros", b"\0" * 4096)
add_bytes("random bytes", bytes(torch.randint(256, (4096,), generator=torch.Generator().manual_seed(0)).tolist()))


@add_made("nothing there")
def _(path: Path) -> None:
    pass


@add_made("an empty folder")
def _(path: Path) -> None:
    path.mkdir()


@add_made("a folder of two LoRAs")
def _(path: Path) -> None:
    path.mkdir()
    for name in ("a", "b"):
        save_file(lora(), path / f"{name}.safetensors")


@add_made("a folder of diffusers and PEFT")
def _(path: Path) -> None:
    path.mkdir()
    for name in lora_files.FILES:
        save_file(lora(), path / name)


@add_made("a folder of one LoRA", 1)
def _(path: Path) -> None:
    path.mkdir()
    save_file(lora(), path / "fox.safetensors")


@add_made("a named pipe")
def _(path: Path) -> None:
    os.mkfifo(path)


@add_made("a link to itself")
def _(path: Path) -> None:
    path.symlink_to(path.name)


# Weights.
add("sound", 1, lora())
add("no tensors", 0, {})
add("NaN", 0, lora(lora_down__weight=torch.full((4, 320), torch.nan)))
add("one infinity in half precision", 0, lora(lora_up__weight=torch.full((320, 4), 1e9).half()))
add("another rank of up", 0, lora(up=(320, 8)))
add("rank 0", 0, lora(down=(0, 320), up=(320, 0)))
add("rank above the width", 1, lora(down=(512, 320), up=(320, 512)))
add("transposed", 0, lora(down=(320, 4), up=(4, 320)))
add("one dimension", 0, lora(down=(320,), up=(320,)))
add("no dimensions", 0, lora(down=(), up=()))
add("three dimensions", 0, lora(down=(4, 320, 1), up=(320, 4, 1)))
add("a kernel in a linear layer", 0, lora(down=(4, 320, 3, 3), up=(320, 4, 1, 1)))
add("a convolution without a kernel", 0, lora(CONV))
add("a convolution", 1, lora(CONV, (4, 320, 3, 3), (320, 4, 1, 1)))
add("a convolution with a kernel in up", 0, lora(CONV, (4, 320, 3, 3), (320, 4, 3, 3)))
add("a convolution of 5 by 5", 0, lora(CONV, (4, 320, 5, 5), (320, 4, 1, 1)))
for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2):
    add(f"weights of {dtype}", 1, {name: (tensor / 4).to(dtype) for name, tensor in lora().items()})
for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64):
    add(f"weights of {dtype}", 0, {name: tensor.to(dtype) for name, tensor in lora().items()})
add("two dtypes", 1, lora(lora_up__weight=torch.ones(320, 4).bfloat16()))
add("down only", 0, {name: tensor for name, tensor in lora().items() if "lora_down" in name})
add("alpha only", 0, {f"{QUERY}.alpha": torch.tensor(1.0)})
add("denormal weights", 1, lora(lora_up__weight=torch.full((320, 4), 1e-7).half(), alpha=torch.tensor(0.01)))

# Alphas.
add("alpha of shape (1,)", 1, lora(alpha=torch.tensor([2.0])))
add("alpha of shape (2,)", 0, lora(alpha=torch.ones(2)))
add("alpha of shape (0,)", 0, lora(alpha=torch.ones(0)))
add("alpha NaN", 0, lora(alpha=torch.tensor(torch.nan)))
add("alpha 0", 0, lora(alpha=torch.tensor(0.0)))
add("alpha -4", 1, lora(alpha=torch.tensor(-4.0)))
add("alpha 1e9", 1, lora(alpha=torch.tensor(1e9), lora_up__weight=torch.ones(320, 4).half()))
add("alpha 1e9 in half precision", 0, lora(alpha=torch.tensor(1e9).half()))
add("alpha 1e38", 0, lora(alpha=torch.tensor(3e38), lora_up__weight=torch.full((320, 4), 1e30)))
add("alpha of bool", 0, lora(alpha=torch.tensor(True)))
add("alpha of complex", 0, lora(alpha=torch.tensor(1j)))
add("alpha of int64", 1, lora(alpha=torch.tensor(2)))
add("two alphas", 2, lora(alpha=torch.tensor(2.0)) | lora(KEY, alpha=torch.tensor(3.0)))

# Names.
add("a module twice, by kohya and diffusers", 0, lora() | {DIFFUSERS.format("down"): torch.ones(4, 320)})
original_query = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
add("a module twice, by the original name", 0, lora() | lora(original_query))
add(
    "lora_te and lora_te1", 0, lora(TEXT, (4, 768), (3072, 4)) | lora(TEXT.replace("te_", "te1_"), (4, 768), (3072, 4))
)
add("one odd key", 0, lora() | {"odd": torch.ones(1)})
add("escape codes and newlines in keys", 0, lora() | {"\x1b[2J\x1b]0;x\x07\n\r\0": torch.ones(1)})
add("text that runs backwards in keys", 0, lora() | {"\u202egnp.exe": torch.ones(1)})
add("a key of a megabyte", 0, lora() | {"k" * 1_000_000: torch.ones(1)})
add("an empty key", 0, lora() | {"": torch.ones(1)})
add("a suffix for a key", 0, lora() | {".lora_down.weight": torch.ones(4, 320)})
add("100,000 keys", 0, {f"lora_unet_x_{index}.lora_down.weight": torch.ones(1) for index in range(100_000)})
add("digits of other scripts", 0, lora(QUERY.replace("0", "\u0660")))
add("a thousand digits", 0, lora(QUERY.replace("0", "9" * 1000)))
add("leading zeros", 0, {DIFFUSERS.format(x).replace(".0.", ".00.", 1): torch.ones(4, 4) for x in ("down", "up")})
add("an embedding with it", 1, lora() | {"bundle_emb.fox.string_to_param.*": torch.ones(1, 768)})
add("an embedding with escape codes", 1, lora() | {"bundle_emb.\x1b[2J\n.clip_l": torch.ones(1, 768)})

# Widths.
add("SDXL's context", 0, lora(f"{BLOCK}_attn2_to_k", (4, 2048), (320, 4)))
add("two widths in a block", 0, lora() | lora(KEY, (4, 640), (640, 4)))
add(
    "SD-2's text encoder with SD-1's U-Net",
    0,
    lora(f"{BLOCK}_attn2_to_k", (4, 768)) | lora(TEXT, (4, 1024), (4096, 4)),
)
add("a feed-forward of 7 times", 0, lora(f"{BLOCK}_ff_net_0_proj", (4, 320), (2240, 4)))
add("SD-2", 2, lora(f"{BLOCK}_attn2_to_k", (4, 1024)) | lora(TEXT, (4, 1024), (4096, 4)))

# Other kinds.
for suffix in "hada_w1_a lokr_w1 a1.weight oft_blocks on_input w_norm b_norm diff diff_b lora_mid.weight".split():
    add(f"a {suffix}", 0, lora() | {f"{KEY}.{suffix}": torch.ones(4, 4)})
add("SDXL", 0, lora("lora_te2_text_model_encoder_layers_0_mlp_fc1"))
add("SD-3", 0, lora("lora_unet_joint_blocks_0_x_block_attn_qkv"))
add("FLUX", 0, lora("lora_unet_double_blocks_0_img_attn_proj"))
add("a textual inversion", 0, {"emb_params": torch.ones(1, 768)})
add("a whole model", 0, {"model.diffusion_model.out.2.weight": torch.ones(4, 4)})

# DoRA.
add("DoRA", 1, lora(dora_scale=torch.ones(320, 1)))
add("DoRA of a convolution", 1, lora(CONV, (4, 320, 3, 3), (320, 4, 1, 1), dora_scale=torch.ones(320, 1, 1, 1)))
add("DoRA of columns", 0, lora(dora_scale=torch.ones(1, 320)))
add("DoRA of another width", 0, lora(dora_scale=torch.ones(99)))
add("DoRA of some modules", 0, lora(dora_scale=torch.ones(320, 1)) | lora(KEY))
add("DoRA with NaN", 0, lora(dora_scale=torch.full((320, 1), torch.nan)))

# Metadata.
for name, text in {
    "not JSON": "{",
    "a list": "[]",
    "a number": "7",
    "nested": "[" * 100_000,
    "with a pattern that is no expression": '{"unet.alpha_pattern": {"(": 1}}',
    "with a pattern that takes for ever": '{"unet.alpha_pattern": {"(.*)*(.*)*x": 1}}',
    "with a pattern of many stars": '{"unet.alpha_pattern": {".*.*.*.*.*.*.*.*x": 1}}',
    "with a pattern of many choices": json.dumps({"unet.alpha_pattern": {"(.|.)" * 60 + "x": 1}}),
    "with patterns in a list": '{"unet.alpha_pattern": ["to_q"]}',
    "with an alpha of text": '{"unet.lora_alpha": "8"}',
    "with an alpha of NaN": '{"unet.lora_alpha": NaN}',
    "with an endless alpha": '{"unet.lora_alpha": 1e999}',
    "with a huge whole alpha": '{"unet.lora_alpha": ' + "9" * 400 + "}",
}.items():
    add(f"configuration {name}", 0, lora(), {METADATA: text})
add("configuration with odd ranks", 1, lora(), {METADATA: '{"unet.rank_pattern": {"(": 1}, "unet.r": "many"}'})
add("metadata with escape codes", 1, lora(), {"ss_\x1b[2J": "\x1b]0;x\x07\n", "ss_x": "\u202e" * 1000})
add("a megabyte of metadata", 1, lora(), {"ss_tag_frequency": "x" * 1_000_000})
for name, text in {"not JSON": "{", "a list": "[]", "binary": "\udcff"}.items():

    @add_made(f"adapter_config.json {name}")
    def _(path: Path, text: str = text) -> None:
        path.mkdir()
        save_file(
            {PEFT.format("A"): torch.ones(4, 320), PEFT.format("B"): torch.ones(320, 4)},
            path / "adapter_model.safetensors",
        )
        (path / "adapter_config.json").write_text(text, errors="surrogateescape")


def wrong(name: str, source: Path, target: Path, in_process: bool) -> tuple[str, str]:
    """Convert `source`: what is wrong with what came of it, "" if nothing, and the first line that was printed."""
    modules, _ = CASES[name]
    code, out, err = run_here(source, target) if in_process else run_program(source, target)
    said = (out + err).strip().splitlines() or [""]
    left = sorted(path.name for path in target.parent.iterdir() if path != target)
    if left:
        return f"left {left}", said[-1]
    if "Traceback" in err or code not in (0, 2):
        return f"exit {code} with a traceback", said[-1]
    if any(not line.isprintable() for line in said):
        return "printed control characters", repr(said[-1])
    if code != (0 if modules else 2):
        return f"exit {code}", said[-1]
    if code == 2:
        errors = [line for line in err.splitlines() if "error: " in line]
        return "an output" if target.exists() else "" if len(errors) == 1 == err.count(
            errors[0]
        ) else "no sentence", said[-1]
    layers, tensors = lora_files.read(target).layers, load_file(target)
    sound = len(layers) == modules and all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    return "" if sound else f"{len(layers)} modules, or not finite", said[0]


def run_here(source: Path, target: Path) -> tuple[int, str, str]:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            convert_lora([str(source), str(target)])
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
    return code, out.getvalue(), err.getvalue()


def run_program(source: Path, target: Path) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "sketch_perceptual", "convert", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of the files to try (default: all)")
    parser.add_argument("--every", type=int, default=20, help="run each N-th as a program of its own (default: 20)")
    args = parser.parse_args()
    names = [name for name in CASES if not args.names or any(part in name for part in args.names)]
    counts: Counter[str] = Counter()
    for index, name in enumerate(names):
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "hostile.safetensors"), Path(folder, "out", "converted.safetensors")
            target.parent.mkdir()
            CASES[name][1](source)
            start = time.monotonic()
            fault, said = wrong(name, source, target, in_process=bool(index % args.every))
        seconds = time.monotonic() - start
        fault = fault or ("takes more than a minute" if seconds > 60 else "")
        result = "WRONG" if fault else "read" if CASES[name][0] else "refused"
        counts[result] += 1
        print(f"{result:8}{seconds:5.1f} s  {name:42} {fault or said.replace(folder, '')[-110:]}", flush=True)
    print(f"{len(names)} files: {counts['read']} read, {counts['refused']} refused, {counts['WRONG']} wrong")
    sys.exit(bool(counts["WRONG"]))


if __name__ == "__main__":
    main()
