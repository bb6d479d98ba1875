"""Real checkpoints of every family: saved by their own classes, loaded by ivtp.load_model, prompts by their processors."""

import pytest
import torch
from conftest import close
from helpers.families import FAMILIES, TEXTS, batch, family, llava_1_5, photo

import ivtp


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model, processor, _ = family(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return request.param, folder


def answer(model, inputs, **settings):
    with ivtp.prune(model, "fastv", keep=9, **settings) as run:
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True, output_logits=True
        )
    return torch.stack(out.logits, 1), run.trace


def test_a_saved_checkpoint_answers_as_the_model_it_was_saved_from(saved):
    """Weights, config, tokenizer, image processor and chat template survive the way through the files."""
    kind, folder = saved
    model, processor = ivtp.load_model(folder)
    original, own, image = family(kind)
    picture = photo(70, 56)
    prompt = image + TEXTS[0]
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
    expected = own(images=[picture], text=[prompt], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    close(answer(model, inputs)[0], answer(original, expected)[0])
    assert ivtp.shape_of(model) == ivtp.shape_of(model.config)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_type_and_its_answers(saved, dtype):
    """Scores stay float32 inside; what the model computes in comes out in its own type and near float32's."""
    kind, folder = saved
    half, _ = ivtp.load_model(folder, dtype=dtype)
    inputs = batch(kind)
    inputs = {k: v.to(half.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with ivtp.prune(half, "none"):
        kept = half(**inputs).logits[:, -1]
    assert kept.dtype == half.dtype
    # Not to the bit: a kernel for narrow types rounds a slice and its copy differently.
    close(kept, half(**inputs).logits[:, -1], 0.05)
    logits, trace = answer(half, inputs)
    assert logits.isfinite().all()
    assert [len(row) for row in trace.kept.position] == [9] * len(TEXTS)


def test_four_bits_prune_too(tmp_path):
    """Quantised linear layers are the model's own modules: the loop calls them and nothing else."""
    pytest.importorskip("bitsandbytes", reason="4-bit weights are bitsandbytes'; it is part of the dev extra")
    model, processor, _ = llava_1_5(width=64)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    quantised, _ = ivtp.load_model(tmp_path, load_in_4bit=True)
    assert any("4bit" in type(module).__name__ for module in quantised.modules())
    inputs = batch("llava")
    with ivtp.prune(quantised, "none"):
        kept = quantised(**inputs).logits[:, -1]
    close(kept, quantised(**inputs).logits[:, -1], 1e-3)
    assert answer(quantised, inputs)[0].isfinite().all()


def test_parts_that_are_loaded_from_disk_when_called(saved, tmp_path):
    """accelerate's hooks sit on the modules that the loop calls, so an offloaded layer is there when it is needed."""
    kind, folder = saved
    inputs = batch(kind)
    whole, _ = ivtp.load_model(folder)
    names = {name.rsplit(".", 1)[0] for name, _ in whole.named_parameters()}
    placed = {name: "disk" if ".layers.4." in name or ".blocks.2." in name else "cpu" for name in names}
    loose = {name: "cpu" for name, _ in whole.named_parameters() if name.endswith("image_newline")}
    placed |= loose | {"lm_head": "cpu"}
    from accelerate import dispatch_model

    split = dispatch_model(ivtp.load_model(folder)[0], placed, offload_dir=tmp_path, main_device="cpu")
    assert any(weight.device.type == "meta" for weight in split.parameters())
    close(answer(split, inputs)[0], answer(whole, inputs)[0])
