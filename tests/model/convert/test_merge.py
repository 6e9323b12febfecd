"""A text model gets a vision tower: the exact tensors of both, a tokenizer with names for images, clear errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, Mistral3ForConditionalGeneration

from conf.system.errors import UserError
from model.convert.__main__ import main
from model.convert.conversion import export_checkpoint, import_checkpoint
from model.convert.merge import merge_checkpoints
from model.convert.progress import Progress
from model.hf.image_tokens import IMAGE_TOKENS
from tests.helpers.edit_exports import edit_json
from tests.helpers.tiny_checkpoints import MASK_TOKEN, make_ministral3_vlm, save_tiny_tokenizer, tiny_model_config
from tests.model.convert.test_fp8 import MODEL as FP8_MODEL
from tests.model.convert.test_fp8 import make_fp8

MINISTRAL_TOKENS = {10: 19, 12: 20, 13: 21}  # [IMG], [IMG_BREAK], [IMG_END] -> ours
START = "<|image_start|>"


def merge(folder: Path, target: str = "merged", text: str = "nld", vision: str = "ministral", **options: Any) -> Any:
    options = {"dtype": torch.float32, "max_shard_bytes": 10**9} | options
    return merge_checkpoints(folder / text, folder / vision, folder / target, MASK_TOKEN, Progress(), **options)


def give_ministral_names(directory: Path) -> None:
    """Let a tiny tokenizer name the ids of images as Ministral 3's does."""
    path = directory / "tokenizer.json"
    text = path.read_text()
    for old, new in {"<|im_start|>": "[IMG]", "<think>": "[IMG_BREAK]", "</think>": "[IMG_END]"}.items():
        text = text.replace(json.dumps(old)[1:-1], new)
    path.write_text(text)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save `nld`, a text export in fp32; `ministral` with vision; `merged` of both. Do not change them."""
    folder = tmp_path_factory.mktemp("merge")
    make_ministral3_vlm(folder / "base", dtype=torch.float32, tied=False, seed=1)
    import_checkpoint(folder / "base", folder / "run", MASK_TOKEN, Progress())
    export_checkpoint(folder / "run", folder / "nld", Progress(), dtype=torch.float32, max_shard_bytes=10**9)
    make_ministral3_vlm(folder / "ministral", dtype=torch.float32, tied=False, seed=2)
    give_ministral_names(folder / "ministral")
    merge(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Make a private copy of `saved`."""
    return shutil.copytree(saved, tmp_path / "copy")


def test_every_tensor_is_that_of_one_of_the_two(saved: Path) -> None:
    text, vision, merged = (load_file(saved / name / "model.safetensors") for name in ("nld", "ministral", "merged"))
    tower = {name: weight for name, weight in vision.items() if name.startswith(("vision_tower.", "multi_modal_"))}
    assert merged.keys() == text.keys() | {f"encoder.{name}" for name in tower} and len(tower) == 2 + 9 + 4
    for name, weight in tower.items():
        assert torch.equal(merged[f"encoder.{name}"], weight), name
    embedding = text.pop("encoder.embed_tokens.weight")
    for theirs, ours in MINISTRAL_TOKENS.items():
        embedding[ours] = vision["language_model.model.embed_tokens.weight"][theirs]
    assert torch.equal(merged["encoder.embed_tokens.weight"], embedding)
    for name, weight in text.items():
        assert torch.equal(merged[name], weight), name


def test_without_ministrals_names_the_text_models_embeddings_stay(folder: Path) -> None:
    save_tiny_tokenizer(folder / "ministral")
    merge(folder, "other")
    text, merged = (load_file(folder / name / "model.safetensors") for name in ("nld", "other"))
    assert torch.equal(merged["encoder.embed_tokens.weight"], text["encoder.embed_tokens.weight"])


@pytest.mark.parametrize(("spelling", "vocab_size"), [("vision", 384), ("transformers5", 385)])
def test_export_import_export_gives_the_same_bytes(tmp_path: Path, spelling: Any, vocab_size: int) -> None:
    model = tiny_model_config(vocab_size=vocab_size)
    make_ministral3_vlm(tmp_path / "nld", model=model, spelling="text", seed=1)
    make_ministral3_vlm(tmp_path / "ministral", model=model, spelling=spelling)
    merge(tmp_path, dtype=torch.bfloat16)
    import_checkpoint(tmp_path / "merged", tmp_path / "run", MASK_TOKEN, Progress())
    export_checkpoint(tmp_path / "run", tmp_path / "again", Progress(), max_shard_bytes=10**9)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("merged", "again"))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert json.loads(first["config.json"])["vocab_size"] == vocab_size


def test_config_has_the_released_keys(saved: Path) -> None:
    values = json.loads((saved / "merged" / "config.json").read_text())
    expected = {
        "architectures": ["NemotronLabsDiffusionVLMModel"],
        "model_type": "nemotron_labs_diffusion_vlm",
        "dlm_type": "llada",
        "dlm_arch": "encoder",
        "spatial_merge_size": 2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": False,
        "vision_feature_layer": -1,
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "patch_size": 14,
            "image_size": 56,
            "num_channels": 3,
            "hidden_act": "silu",
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    }
    assert {key: values.get(key) for key in expected} == expected
    assert values["rope_parameters"]["type"] == values["rope_parameters"]["rope_type"] == "yarn"
    text = json.loads((saved / "nld" / "config.json").read_text())
    assert {key for key in text if values[key] != text[key]} == {
        *("architectures", "model_type", "auto_map", "rope_parameters")
    }


def test_logits_are_those_of_transformers_with_the_same_tensors(saved: Path) -> None:
    """Transformers reads the same merge, made by hand: a Ministral 3 directory with the text model's tensors."""
    processor: Any = AutoProcessor.from_pretrained(saved / "merged", trust_remote_code=True)
    model = AutoModel.from_pretrained(saved / "merged", trust_remote_code=True, dtype=torch.float32)
    reference: Any = Mistral3ForConditionalGeneration.from_pretrained(saved / "base", dtype=torch.float32)
    reference.config.image_token_id = IMAGE_TOKENS["<|image_pad|>"]
    theirs = reference.state_dict()
    vision = Mistral3ForConditionalGeneration.from_pretrained(saved / "ministral").state_dict()
    theirs |= {name: vision[name] for name in theirs if "vision_tower" in name or "projector" in name}
    name = "model.language_model.embed_tokens.weight"
    for row, ours in MINISTRAL_TOKENS.items():
        theirs[name][ours] = vision[name][row]
    reference.load_state_dict(theirs)
    pictures = [Image.effect_noise(size, 90).convert("RGB") for size in ((50, 91), (28, 40))]
    inputs = processor(text=f"add{START} to {START} first", images=pictures)
    with torch.no_grad():
        ours, expected = (network.eval()(**inputs).logits for network in (model, reference))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_the_tokenizer_names_images_and_its_template_places_them(saved: Path, tmp_path: Path) -> None:
    source = shutil.copytree(saved / "nld", tmp_path / "nld")
    template = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    shutil.copytree(saved / "ministral", tmp_path / "ministral")
    merge(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS)) == list(IMAGE_TOKENS.values())
    assert tokenizer.convert_tokens_to_ids(MASK_TOKEN) == 100
    parts = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == f"<|im_start|>s<|im_end|><|im_start|>{START}a{START}b<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert [token for token in ids if token == 18] == [18, 18]


def test_a_template_that_places_images_stays(folder: Path) -> None:
    (folder / "nld" / "chat_template.jinja").write_text(f"{{# {START} #}}mine")
    merge(folder, "other")
    assert (folder / "other" / "chat_template.jinja").read_text() == f"{{# {START} #}}mine"


def test_an_8_bit_instruct_checkpoint_gives_its_tower(tmp_path: Path) -> None:
    """Every instruct release has matrices of the text model in 8 bits, tower and projector in bf16."""
    make_fp8(tmp_path / "ministral")
    make_ministral3_vlm(tmp_path / "nld", model=FP8_MODEL, spelling="text", seed=1)
    converted = merge(tmp_path, dtype=torch.bfloat16)
    vision, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("ministral", "merged"))
    tower = {name for name in vision if name.startswith(("vision_tower.", "multi_modal_"))}
    assert all(torch.equal(merged[f"encoder.{name}"], vision[name]) for name in tower)
    assert converted.skipped == len(vision) - len(tower), "every other tensor is counted"


def test_the_command_line_merges_and_explains(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        status = main(["--vision", str(folder / "ministral"), *arguments])
        return status, capsys.readouterr().err.replace("\n", " ")

    status, printed = run("--from", str(folder / "nld"), "--to", str(folder / "new"), "--dtype", "fp32")
    assert status == 0 and "54 tensors" in printed and "read back and compared, 39 entries skipped" in printed
    new, merged = ((folder / name / "model.safetensors").read_bytes() for name in ("new", "merged"))
    assert new == merged
    status, printed = run("--from", str(folder / "run"), "--to", str(folder / "other"))
    assert status == 2 and "--vision needs a Hugging Face directory as --from: export" in printed
    status, printed = run(
        "--from", str(folder / "nld"), "--to", str(folder / "other"), "--parallel", "tensor_parallel=2"
    )
    assert status == 2 and "--parallel has no effect here" in printed
    status, printed = run("--refresh", str(folder / "nld"))
    assert status == 2 and "--vision has no effect beside --refresh" in printed


def change_projector(folder: Path) -> None:
    path = folder / "ministral" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: w for name, w in tensors.items() if not name.startswith("multi_modal_")}, path, {"format": "pt"})


def other_size(folder: Path) -> None:
    shutil.rmtree(folder / "ministral")
    make_ministral3_vlm(folder / "ministral", model=tiny_model_config(hidden_size=32))


def without_vision(folder: Path) -> None:
    shutil.rmtree(folder / "ministral")
    make_ministral3_vlm(folder / "ministral", spelling="text")


def change_tower(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "ministral" / "config.json"
        edit_json(path, vision_config=json.loads(path.read_text())["vision_config"] | changes)

    return change


def with_images(folder: Path) -> None:
    shutil.rmtree(folder / "nld")
    (folder / "merged").rename(folder / "nld")


def name_elsewhere(folder: Path) -> None:
    path = folder / "nld" / "tokenizer.json"
    path.write_text(path.read_text().replace("<SPECIAL_30>", "<|image_break|>"))


def template_uses_id(folder: Path) -> None:
    (folder / "nld" / "chat_template.jinja").write_text("<SPECIAL_18>{{ messages }}<SPECIAL_18>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_projector, r"lacks multi_modal_projector\.\S+, .* unlike its config.json: download it again"),
        (other_size, r"features of 32 numbers, .* has hidden_size 48: give a Ministral 3 checkpoint of the same size"),
        (without_vision, r"model_type 'ministral3': give a Ministral 3 checkpoint with its vision tower"),
        (change_tower(intermediate_size=72), r"is F32 \[64, 32\], but config.json makes it \[72, 32\]"),
        (change_tower(num_hidden_layers=2), r"lacks vision_tower.transformer.layers.1"),
        (change_tower(patch_size=16), r"features of 16 \* 2 pixels .* makes images for 28"),
        (change_tower(head_dim=8), r"2 heads of 8 in vision_config, which are not hidden_size 32"),
        (change_tower(hidden_act="gelu"), r"vision_config.hidden_act='gelu': this project computes 'silu' only"),
        (with_images, "reads images already: leave --vision out"),
        (name_elsewhere, r"has <\|image_break\|> as id 30, not 20"),
        (template_uses_id, r"the chat template in .* writes <SPECIAL_18>, whose id images need"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_does_not_fit_is_one_clear_error(folder: Path, change: Any, message: str) -> None:
    change(folder)
    with pytest.raises(UserError, match=message):
        merge(folder, "other")
    assert not list(folder.glob("other*"))


def test_a_tokenizer_without_image_tokens_is_refused_on_import(folder: Path) -> None:
    save_tiny_tokenizer(folder / "merged")
    with pytest.raises(UserError, match=r"has no <\|image_start\|> with id 18, but the model reads images"):
        import_checkpoint(folder / "merged", folder / "other", MASK_TOKEN, Progress())
