"""Official checkpoints: options in every form, strict names of weights, damaged files, and nothing executed."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import io
import math
import operator
import os
import pickle
import random
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from goldens import MAE_AST, Golden
from policy import assert_golden

from mae_ast_fast import MAEASTConfig
from mae_ast_fast.checkpoints.fairseq import convert_state_dict, fairseq_config
from mae_ast_fast.checkpoints.fairseq_file import read_checkpoint
from mae_ast_fast.models.transformer import sinusoid

SECTIONS = ("model", "task", "criterion")
UNUSED = {"encoder_mask_emb", "layer_norm.weight", "layer_norm.bias"}
NOT_OFFICIAL = ("masking", "norm_pix_loss", "positions", "prediction_stride", "temperature")  # fields of our own


@functools.lru_cache
def golden(name="mae_ast_patch_small"):
    return Golden(name)


def nested(options):
    """The golden's flat keys as a checkpoint's ``cfg``, with other sections added."""
    cfg = {section: {} for section in SECTIONS}
    for key, value in options.items():
        if key.startswith("cfg/"):
            _, section, name = key.split("/")
            cfg[section][name] = value
    return {"common": {"fp16": True, "seed": 1337}, **cfg, "optimizer": {"_name": "adam", "lr": [0.0001]}}


def flat(options):
    return {key.split("/")[-1]: value for key, value in options.items() if key.startswith("cfg/")}


def checkpoint(state_dict, cfg=None, args=None, **others):
    """The top level of a checkpoint, as fairseq writes it."""
    return {
        "args": args,
        "cfg": cfg,
        "model": state_dict,
        "criterion": None,
        "optimizer_history": [
            {"criterion_name": "MAE_AST_Criterion", "optimizer_name": "FairseqAdam", "num_updates": 7}
        ],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"epoch": 1},
            "previous_training_time": 12.5,
            "metrics": [("default", [(1, 2)])],
        },
        "last_optimizer_state": {"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        **others,
    }


def save(path, content, protocol=2):
    torch.save(content, path, pickle_protocol=protocol)
    return path


def write_zip(path, data_pkl, records=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        for name, data in records:
            archive.writestr(f"archive/data/{name}", data)
    return path


class FakeModule(types.ModuleType):
    pass


def fake_class(patch, dotted):
    """A class that can be pickled under another package's name while ``patch`` is active."""
    module, _, name = dotted.rpartition(".")
    names = module.split(".")
    for package in (".".join(names[: n + 1]) for n in range(len(names))):
        if not isinstance(sys.modules.get(package), FakeModule):
            patch.setitem(sys.modules, package, FakeModule(package))
    cls = type(name, (), {"__module__": module})
    patch.setattr(sys.modules[module], name, cls, raising=False)
    return cls


def save_omegaconf(path, state_dict, cfg):
    """Pickles ``cfg`` as OmegaConf 2.0 to 2.3 does: nodes with _content or _val, their metadata and their parents."""
    with pytest.MonkeyPatch.context() as patch:
        names = ("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata")
        containers = {name.split(".")[1]: fake_class(patch, f"omegaconf.{name}") for name in names}
        nodes = {
            value_type: fake_class(patch, f"omegaconf.nodes.{name}Node")
            for value_type, name in (
                (int, "Integer"),
                (float, "Float"),
                (bool, "Boolean"),
                (str, "String"),
                (type(None), "Any"),
            )
        }

        def to_node(value, key, parent):
            container = {dict: "DictConfig", list: "ListConfig"}.get(type(value))
            node = containers[container]() if container else nodes[type(value)]()
            metadata = containers["ContainerMetadata" if container else "Metadata"]()
            metadata.__dict__.update(
                ref_type=dict, optional=True, key=key, flags={}, resolver_cache=collections.defaultdict(dict)
            )
            node.__dict__.update(_metadata=metadata, _parent=parent)
            if isinstance(value, dict):
                node._content = {name: to_node(item, name, node) for name, item in value.items()}
            elif isinstance(value, list):
                node._content = [to_node(item, index, node) for index, item in enumerate(value)]
            else:
                node._val = value
            return node

        return save(path, checkpoint(state_dict, cfg=to_node(cfg, None, None)))


# ---------------------------------------------------------------- content of a file


@pytest.mark.parametrize("form", ["dict", "namespace", "flat args", "namespace sections", "omegaconf"])
@pytest.mark.parametrize("name", MAE_AST)
def test_fairseq_config_every_form_of_options_gives_same_config(tmp_path, name, form):
    state_dict, cfg, args = golden(name).state_dict, nested(golden(name).options), flat(golden(name).options)
    old = argparse.Namespace(arch="mae_ast", task="mae_ast_pretraining", criterion="mae_ast", **args)
    path = tmp_path / "checkpoint.pt"
    match form:
        case "dict":
            save(path, checkpoint(state_dict, cfg=cfg))
        case "namespace":
            save(path, checkpoint(state_dict, args=old))
        case "flat args":
            save(path, checkpoint(state_dict, args=vars(old)))
        case "namespace sections":
            save(path, checkpoint(state_dict, cfg={key: argparse.Namespace(**value) for key, value in cfg.items()}))
        case "omegaconf":
            save_omegaconf(path, state_dict, cfg)
    loaded = read_checkpoint(path)
    options = loaded["args" if form in ("namespace", "flat args") else "cfg"]
    assert set(loaded) == {"model", "args" if form in ("namespace", "flat args") else "cfg"}
    if form in ("dict", "namespace sections", "omegaconf"):
        assert options == cfg
    else:
        assert options == vars(old)
    config = fairseq_config(options)
    assert config == fairseq_config(golden(name).options)
    converted = convert_state_dict(loaded["model"], config)
    direct = convert_state_dict(state_dict, config)
    assert converted.keys() == direct.keys()
    assert all(torch.equal(converted[key], direct[key]) for key in direct)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_read_checkpoint_matches_torch_load(tmp_path, protocol):
    shared = torch.arange(24.0)
    tensors = collections.OrderedDict(
        whole=shared,
        view=shared.view(4, 6)[1:, 2:],
        transposed=shared.view(4, 6).T,
        parameter=torch.nn.Parameter(torch.randn(3, 2)),
        empty=torch.empty(0, 3),
        scalar=torch.tensor(5),
        **{
            str(dtype): torch.arange(7).to(dtype)
            for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8)
        },
        **{str(dtype): torch.arange(7).to(dtype) for dtype in (torch.int16, torch.int32, torch.uint8, torch.bool)},
    )
    tensors._metadata = collections.OrderedDict({"": {"version": 1}})
    cfg = {"none": None, "text": "größe", "long": 2**70, "negative": -3, "list": [1, (2.5, True)], "bytes": b"\x00\xff"}
    path = tmp_path / "checkpoint.pt"
    save(path, checkpoint(tensors, cfg=cfg), protocol)
    loaded = read_checkpoint(path)
    expected = torch.load(path, weights_only=False)["model"]
    assert list(loaded["model"]) == list(tensors)
    for name, tensor in expected.items():
        assert loaded["model"][name].dtype == tensor.dtype, name
        assert torch.equal(loaded["model"][name], tensor.detach()), name
    if protocol == 2:  # before protocol 3, pickle spells bytes as a call
        assert "_codecs.encode" in repr(loaded["cfg"].pop("bytes"))
        cfg.pop("bytes")
    assert loaded["cfg"] == {**cfg, "list": [1, [2.5, True]]}


def test_read_checkpoint_without_optimizer_data_succeeds(tmp_path):
    """The file's optimizer data is missing."""
    complete = save(
        tmp_path / "complete.pt", checkpoint({"w": torch.ones(3)}, cfg={}, last_optimizer_state=torch.full((5,), 7.0))
    )
    cut = tmp_path / "cut.pt"
    with zipfile.ZipFile(complete) as source, zipfile.ZipFile(cut, "w") as target:
        records = {info.filename: source.read(info) for info in source.infolist()}
        dropped = [name for name, data in records.items() if data == torch.full((5,), 7.0).numpy().tobytes()]
        assert len(dropped) == 1
        for name in records.keys() - set(dropped):
            target.writestr(name, records[name])
    assert torch.equal(read_checkpoint(cut)["model"]["w"], torch.ones(3))


def test_read_checkpoint_without_options_returns_weights_only(tmp_path):
    assert set(read_checkpoint(save(tmp_path / "a.pt", checkpoint({"w": torch.ones(1)})))) == {"model"}


# ---------------------------------------------------------------- other and damaged files


def truncated(path):
    data = save(path, checkpoint(golden().state_dict, cfg={})).read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def damaged(path):
    data = bytearray(save(path, checkpoint({"w": torch.full((1000,), 3.0)}, cfg={})).read_bytes())
    offset = data.index(torch.full((1000,), 3.0).numpy().tobytes())
    data[offset + 2001] ^= 1
    path.write_bytes(data)


def zip_with_byteorder(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": {}}, 2))
        archive.writestr("archive/byteorder", "big" if sys.byteorder == "little" else "little, not big")


NOT_CHECKPOINTS = {
    "an empty file": lambda path: path.write_bytes(b""),
    "begins with b'PLEASE": lambda path: path.write_text("PLEASE SIGN IN to download this file"),
    "truncated zip": truncated,
    "Bad CRC-32": damaged,
    "bare pickle": lambda path: path.write_bytes(pickle.dumps({"model": {}})),
    "torch < 1.6": lambda path: torch.save({"model": {}}, path, _use_new_zipfile_serialization=False),
    "zip file without one": lambda path: zipfile.ZipFile(path, "w").writestr("readme.txt", "hello"),
    "compressed": lambda path: write_zip(path, pickle.dumps({"model": {}}), compression=zipfile.ZIP_DEFLATED),
    "a list": lambda path: save(path, [1, 2]),
    r"keys \['model_weight', 'cfg'\]": lambda path: save(path, {"model_weight": {}, "cfg": {}}),
    "'model' to be a dict of tensors, found None": lambda path: save(path, checkpoint(None)),
    "'model' to be a dict of tensors, found an object of torch.nn.modules.linear.Linear": lambda path: save(
        path, checkpoint(torch.nn.Linear(2, 2))
    ),
    "model entry 'w' to be a tensor, found 3": lambda path: save(path, checkpoint({"w": 3})),
    "the key 3": lambda path: save(path, checkpoint({3: torch.ones(1)})),
    "'cfg' to hold options by name, found a list": lambda path: save(path, checkpoint({}, cfg=[1])),
    "big": zip_with_byteorder,
}


@pytest.mark.parametrize("message", NOT_CHECKPOINTS)
def test_read_checkpoint_other_file_is_described(tmp_path, message):
    path = tmp_path / "file.pt"
    NOT_CHECKPOINTS[message](path)
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)


def test_read_checkpoint_missing_file_raises_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.pt")


class Rebuilt:
    """Pickles as a call of torch's rebuild function with these arguments."""

    def __init__(self, *args):
        self.args = args

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.args


class Storage:
    def __init__(self, *pid):
        self.pid = pid


class StoragePickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.pid if isinstance(value, Storage) else None


def forged(path, *, numel=6, key="0", size=(2, 3), stride=(3, 1), offset=0, tag="storage", dtype=torch.FloatStorage):
    """A checkpoint with one tensor of these arguments and 24 bytes of data."""
    data = io.BytesIO()
    tensor = Rebuilt(Storage(tag, dtype, key, "cpu", numel), offset, size, stride, False, {})
    StoragePickler(data, 2).dump(checkpoint({"w": tensor}))
    return write_zip(path, data.getvalue(), [("0", torch.arange(6.0).numpy().tobytes())])


def test_read_checkpoint_well_formed_forgery_is_read(tmp_path):
    assert torch.equal(read_checkpoint(forged(tmp_path / "a.pt"))["model"]["w"], torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize(
    "arguments",
    [
        {"numel": 7},
        {"numel": 10**15},
        {"numel": -6},
        {"numel": "6"},
        {"key": "1"},
        {"key": "../data.pkl"},
        {"key": 0},
        {"size": (2, 4)},
        {"size": (10**9, 10**9), "stride": (0, 0)},
        {"size": (-2, -3)},
        {"size": 6},
        {"size": (6,)},
        {"stride": (4, 1)},
        {"stride": (-3, 1)},
        {"stride": None},
        {"offset": 1},
        {"offset": -1},
        {"offset": None},
        {"tag": "module"},
        {"dtype": torch.DoubleStorage},
        {"dtype": torch.ComplexFloatStorage},
        {"dtype": None},
    ],
    ids=str,
)
def test_read_checkpoint_tensor_that_misfits_its_data_is_rejected(tmp_path, arguments):
    with pytest.raises(ValueError, match="'w'"):
        read_checkpoint(forged(tmp_path / "a.pt", **arguments))


# ---------------------------------------------------------------- nothing is executed


class Call:
    """Pickles as a call: unpickling calls ``function(*args)``."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self):
        """Never called: pickle requires a callable function, and a call's result may serve as one."""


def torch_bytes(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def touch(marker):
    return f"{sys.executable} -S -E -c \"open(r'{marker}', 'w').close()\""


ATTACKS = {
    "os.system": lambda marker: Call(os.system, touch(marker)),
    "builtins.eval": lambda marker: Call(eval, f"open({str(marker)!r}, 'w').close()"),
    "builtins.exec": lambda marker: Call(exec, f"open({str(marker)!r}, 'w').close()"),
    "functools.partial": lambda marker: Call(functools.partial(Path.touch, marker)),
    "operator.methodcaller": lambda marker: Call(operator.methodcaller("touch"), marker),
    "operator.attrgetter": lambda marker: Call(Call(operator.attrgetter("touch"), marker)),
    "getattr": lambda marker: Call(Call(getattr, marker, "touch")),
    "torch.storage._load_from_bytes": lambda marker: Call(
        torch.storage._load_from_bytes, torch_bytes(Call(os.system, touch(marker)))
    ),
    "torch.hub": lambda marker: Call(torch.hub.download_url_to_file, Path(__file__).as_uri(), str(marker), None, False),
    "torch.save": lambda marker: Call(torch.save, 1, str(marker)),
}
ATTACKED_PARTS = {
    "top": lambda attack: attack,
    "model": checkpoint,
    "model entry": lambda attack: checkpoint({**golden().state_dict, "encoder_mask_emb": attack}),
    "cfg": lambda attack: checkpoint(golden().state_dict, cfg=attack),
    "option": lambda attack: checkpoint(golden().state_dict, cfg=flat(golden().options) | {"encoder_layers": attack}),
    "unused option": lambda attack: checkpoint(
        golden().state_dict, cfg={**nested(golden().options), "common": {"user_dir": attack}}
    ),
    "task_state": lambda attack: checkpoint(golden().state_dict, cfg=nested(golden().options), task_state=attack),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_torch_load_executes_them(tmp_path, attack):
    """Checks the check: without it, the next test could pass on payloads that do nothing."""
    marker = tmp_path / "marker"
    path = save(tmp_path / "a.pt", checkpoint({"w": ATTACKS[attack](marker)}))
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("section", ATTACKED_PARTS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_read_checkpoint_attack_is_not_executed(tmp_path, attack, section):
    marker = tmp_path / "marker"
    path = save(tmp_path / "a.pt", ATTACKED_PARTS[section](ATTACKS[attack](marker)))
    if section in ("task_state", "unused option"):  # not needed: the checkpoint still loads
        loaded = read_checkpoint(path)
        assert fairseq_config(loaded["cfg"]) == fairseq_config(golden().options)
    elif section == "option":
        with pytest.raises(ValueError, match="option encoder_layers must be an integer, got an object of"):
            fairseq_config(read_checkpoint(path)["cfg"])
    else:
        expected = {"top": "a checkpoint", "model": "'model'", "model entry": "'encoder_mask_emb'", "cfg": "'cfg'"}
        with pytest.raises(ValueError, match=f"expected .*{expected[section]}.*, found an object of"):
            read_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_read_checkpoint_unknown_classes_are_named_and_never_imported(tmp_path, protocol):
    module = "some_package_for_this_test.with_a_rather_long.module_name"
    with pytest.MonkeyPatch.context() as patch:
        activation = fake_class(patch, f"{module}.Activation")
        cfg = nested(golden().options)
        cfg["common"]["backend"] = activation()
        unused = save(tmp_path / "a.pt", checkpoint(golden().state_dict, cfg=cfg, criterion=activation()), protocol)
        cfg["model"]["activation_fn"] = activation()
        used = save(tmp_path / "b.pt", checkpoint(golden().state_dict, cfg=cfg), protocol)
    loaded = read_checkpoint(unused)
    assert fairseq_config(loaded["cfg"]) == fairseq_config(golden().options)
    assert repr(loaded["cfg"]["common"]["backend"]) == f"<{module}.Activation object, not loaded>"
    with pytest.raises(ValueError, match=f"activation_fn must be a string, got an object of {module}.Activation"):
        fairseq_config(read_checkpoint(used)["cfg"])
    assert module not in sys.modules


PICKLE_BOMBS = {
    "nested lists": b"]" * 20_000 + b"a" * 19_999,
    "nested tuples": b")" + b"\x85" * 20_000,
    "nested calls": b"cos\nsystem\n" + b")R" * 20_000,
    "nested tuples as key": b"}" + b")" + b"\x85" * 200_000 + b"K\x01s",  # hashing this key overflows the C stack
    "a list that contains itself": b"]q\x00h\x00a",
    "a list of 2^60 paths": b"]q\x000"
    + b"".join(b"]q%c" % (n + 1) + 2 * (b"h%ca" % n) + b"0" for n in range(60))
    + b"h%c" % 60,
    "a huge memo index": b"]r\xff\xff\xff\xff",
    "a huge string": b"X\xff\xff\xff\xffabc",
    "a huge byte string": b"\x8e" + b"\xff" * 8 + b"abc",
}


@pytest.mark.parametrize("bomb", PICKLE_BOMBS)
def test_read_checkpoint_pickle_bombs_end_quickly(tmp_path, bomb):
    """As ``cfg``, and as ``task_state``, which is not read: a ValueError or plain options, no crash or endless loop."""
    for entry in (b"cfg", b"task_state"):
        path = write_zip(
            tmp_path / "a.pt",
            b"\x80\x02}(X\x05\x00\x00\x00model}X" + bytes([len(entry), 0, 0, 0]) + entry + PICKLE_BOMBS[bomb] + b"u.",
        )
        try:
            options = read_checkpoint(path).get("cfg", {})
        except ValueError as error:
            assert len(str(error)) < 1000
            continue
        assert entry == b"task_state" or bomb == "nested tuples as key"
        with pytest.raises(ValueError, match="enc_sine_pos"):
            fairseq_config(options)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # pickletools, on text opcodes
@pytest.mark.parametrize("cases", [2000, pytest.param(10_000, marks=pytest.mark.long)])
def test_read_checkpoint_mutated_files_are_read_or_rejected(tmp_path, cases):
    """Random edits, 3/4 of them to the pickle and 1/4 to the zip file: a dict of tensors or a ValueError."""
    rng = random.Random(cases)
    source = save(
        tmp_path / "a.pt",
        checkpoint({"w": torch.arange(4.0)}, cfg={"model": {"dropout": 0.1}}, args=argparse.Namespace(a=1)),
    )
    with zipfile.ZipFile(source) as archive:
        records = [
            (info.filename.split("/")[-1], archive.read(info))
            for info in archive.infolist()
            if "/data/" in info.filename
        ]
        data_pkl = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    outcomes = collections.Counter()
    for case in range(cases):
        data = bytearray(data_pkl if case < cases * 3 // 4 else source.read_bytes())
        for _ in range(rng.choice((1, 1, 2, 8))):
            offset = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[offset] = rng.randrange(256)
                case 1:
                    del data[offset]
                case 2:
                    data.insert(offset, rng.randrange(256))
        path = tmp_path / "b.pt"
        if case < cases * 3 // 4:
            write_zip(path, bytes(data), records)
        else:
            path.write_bytes(data)
        try:
            loaded = read_checkpoint(path)
        except ValueError:
            outcomes["rejected"] += 1
        else:
            outcomes["read"] += 1
            assert all(isinstance(tensor, torch.Tensor) for tensor in loaded["model"].values())
    assert min(outcomes["rejected"], outcomes["read"]) > 100, outcomes


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "differences"),
    [
        ("mae_ast_patch_small", {"masking": "random"}),
        ("mae_ast_patch_chunk", {"masking": "chunk"}),
        ("mae_ast_frame_small", {"masking": "random", "patch_size": (2, 128)}),
        ("mae_ast_prenorm_proj", {"masking": "random", "norm_first": True, "encoder_projection": True}),
    ],
)
def test_fairseq_config_golden_options_give_recorded_model(name, differences):
    rates = ("dropout", "attention_dropout", "input_dropout", "encoder_layerdrop")
    expected = {
        **dict.fromkeys(rates, 0.0),
        **{"embed_dim": 64, "ffn_dim": 128, "num_heads": 4, "encoder_layers": 3, "decoder_embed_dim": 64},
        **differences,
    }
    options = golden(name).options
    for form in (options, nested(options), flat(options), argparse.Namespace(**flat(options))):
        assert fairseq_config(form) == MAEASTConfig(**expected)


def test_fairseq_config_each_option_sets_its_own_field():
    """Every value differs from its default and from the others, so that a swap of two shows."""
    options = {
        "ast_kernel_size_time": 8, "ast_kernel_stride_time": 8, "ast_kernel_size_chan": 20,
        "ast_kernel_stride_chan": 20, "feature_dim": 80, "encoder_layers": 5, "encoder_embed_dim": 48,
        "encoder_ffn_embed_dim": 96, "encoder_attention_heads": 6, "layer_norm_first": True,
        "use_post_enc_proj": True, "decoder_embed_dim": 36,
        "decoder_layers": 3, "decoder_layerdrop": 0.01, "dropout": 0.02, "attention_dropout": 0.03,
        "activation_dropout": 0.04, "encoder_layerdrop": 0.06, "dropout_input": 0.07, "random_mask_prob": 0.6,
        "mask_type": "chunk_mask", "reconstruction_weight": 3, "classification_weight": 2.5, "enc_sine_pos": True,
        "dec_sine_pos": True,
    }  # fmt: skip
    expected = MAEASTConfig(
        num_mel_bins=80, patch_size=(8, 20), embed_dim=48, ffn_dim=96, num_heads=6, encoder_layers=5,
        decoder_embed_dim=36, decoder_layers=3, norm_first=True, encoder_projection=True, dropout=0.02,
        attention_dropout=0.03, activation_dropout=0.04, input_dropout=0.07, encoder_layerdrop=0.06,
        decoder_layerdrop=0.01, mask_ratio=0.6, masking="chunk", reconstruction_weight=3.0, classification_weight=2.5,
    )  # fmt: skip
    assert fairseq_config(options) == expected
    assert all(
        getattr(expected, field.name) != field.default
        for field in dataclasses.fields(MAEASTConfig)
        if field.name not in NOT_OFFICIAL
    )
    defaults = fairseq_config({"enc_sine_pos": True, "dec_sine_pos": True})
    assert defaults == MAEASTConfig(masking="random", input_dropout=0.0, encoder_layerdrop=0.0)


def test_fairseq_config_paper_recipes_give_presets():
    base = {"enc_sine_pos": True, "dec_sine_pos": True, "dropout_input": 0.1, "encoder_layerdrop": 0.05}
    frame = {
        f"ast_kernel_{quantity}_{axis}": size
        for quantity in ("size", "stride")
        for axis, size in (("time", 2), ("chan", 128))
    }
    assert fairseq_config({**base, "mask_type": "chunk_mask"}) == MAEASTConfig.preset("patch_base")
    assert fairseq_config({**base, **frame, "encoder_layers": 6}) == MAEASTConfig.preset("frame_base_6layer")
    assert fairseq_config({**base, **frame, "mask_type": "chunk_mask"}) == MAEASTConfig.preset("frame_base")
    assert fairseq_config({**base, "mask_type": "random_mask_batched"}).masking == "random"


def test_fairseq_config_span_masking_keeps_masked_share():
    """SPEC: 1.45, as in the official README, masks a quarter; about 0.3 masks three quarters."""
    for option, share in ((1.45, 0.25), (0.3, 0.75)):
        config = fairseq_config({**flat(golden().options), "mask_type": "retain_spans", "random_mask_prob": option})
        assert config.masking == "span"
        assert round(config.mask_ratio * 20) == round(share * 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ast_kernel_stride_time": 10}, "ast_kernel_stride_time must equal ast_kernel_size_time=16, got 10"),
        ({"ast_kernel_stride_chan": 8}, "ast_kernel_stride_chan must equal"),
        ({"activation_fn": "relu"}, "activation_fn='relu' is unsupported: it must be 'gelu'"),
        ({"enc_sine_pos": False}, "enc_sine_pos=False is unsupported"),
        ({"dec_sine_pos": False}, "dec_sine_pos=False is unsupported"),
        ({"enc_conv_pos": True}, "enc_conv_pos=True is unsupported"),
        ({"dec_conv_pos": True}, "dec_conv_pos=True is unsupported"),
        ({"mask_type": "checkerboard"}, "mask_type must be one of .*, got 'checkerboard'"),
        ({"encoder_layers": "${model.layers}"}, r"encoder_layers must be an integer, got '\$\{model.layers\}'"),
        ({"encoder_layers": 3.0}, "encoder_layers must be an integer, got 3.0"),
        ({"encoder_layers": True}, "encoder_layers must be an integer, got True"),
        ({"dropout": "0.1"}, "dropout must be a number, got '0.1'"),
        ({"dropout": None}, "dropout must be a number, got None"),
        ({"layer_norm_first": 1}, "layer_norm_first must be true or false, got 1"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1"),
        ({"encoder_attention_heads": 7}, "num_heads=7"),
    ],
    ids=str,
)  # fmt: skip
def test_fairseq_config_unsupported_option_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        fairseq_config({**flat(golden().options), **change})


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (None, "got None"),
        ([1], "got a list"),
        ({}, "enc_sine_pos=False .the official default of a missing option. is unsupported"),
        ({"model": {}, "task": "mae_ast_pretraining"}, "section task .* got 'mae_ast_pretraining'"),
    ],
    ids=str,
)  # fmt: skip
def test_fairseq_config_wrong_container_is_rejected(cfg, message):
    with pytest.raises(ValueError, match=message):
        fairseq_config(cfg)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("name", MAE_AST)
def test_convert_state_dict_every_weight_gets_its_new_name(name):
    official, config = golden(name).state_dict, fairseq_config(golden(name).options)
    ours = convert_state_dict(official, config)
    width, patch_dim = config.embed_dim, config.patch_dim
    renamed = {
        "patch_embed": "post_extract_proj",
        "encoder.norm": "encoder.layer_norm",
        "decoder.norm": "decoder.layer_norm",
        **({"encoder_projection": "post_enc_proj"} if config.has_projection else {}),
    }
    for layer in [f"encoder.layers.{n}" for n in range(3)] + [f"decoder.layers.{n}" for n in range(2)]:
        renamed[f"{layer}.out_proj"] = f"{layer}.self_attn.out_proj"
        renamed[f"{layer}.attn_norm"] = f"{layer}.self_attn_layer_norm"
        renamed[f"{layer}.ffn_norm"] = f"{layer}.final_layer_norm"
        renamed[f"{layer}.fc1"], renamed[f"{layer}.fc2"] = f"{layer}.fc1", f"{layer}.fc2"
    suffixes = ("weight", "bias")
    pairs = [(ours.pop(f"{new}.{x}"), official[f"{old}.{x}"]) for new, old in renamed.items() for x in suffixes]
    for suffix in suffixes:
        for layer in [f"encoder.layers.{n}" for n in range(3)] + [f"decoder.layers.{n}" for n in range(2)]:
            qkv = ours.pop(f"{layer}.qkv.{suffix}")
            assert len(qkv) == 3 * width
            pairs += [
                (qkv[i * width : (i + 1) * width], official[f"{layer}.self_attn.{projection}_proj.{suffix}"])
                for i, projection in enumerate("qkv")
            ]
        head = ours.pop(f"head.{suffix}")
        assert len(head) == 2 * patch_dim
        pairs.append((head[:patch_dim], official[f"final_proj_reconstruction.{suffix}"]))
        pairs.append((head[patch_dim:], official[f"final_proj_classification.{suffix}"]))
    pairs.append((ours.pop("mask_token"), official["decoder_mask_emb"]))
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        pairs.append((ours.pop(f"input_norm.{buffer}"), official[f"batch_norm.{buffer}"]))
    assert not ours, "unexpected names"
    assert len(pairs) == len(official.keys() - UNUSED)
    for actual, expected in pairs:
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", MAE_AST)
def test_patch_values_match_official_order(name):
    """The order of post_extract_proj's columns: recorded targets are normalised patches, each value at t * kf + f."""
    case, (kt, kf) = golden(name), fairseq_config(golden(name).options).patch_size
    source = case["source"]
    normal = (source - source.mean()) / (source.var(unbiased=False) + 1e-5).sqrt() * 0.5
    clips, frames, bins = normal.shape
    patches = normal.view(clips, frames // kt, kt, bins // kf, kf).transpose(2, 3).reshape(clips, -1, kt * kf)
    masked = patches[case.mask].view(case["target_m_list"].shape)
    assert_golden(masked, case["target_m_list"])


def test_convert_state_dict_half_precision_weights_become_fp32(tmp_path):
    config = fairseq_config(golden().options)
    half = {name: t.half() if t.is_floating_point() else t for name, t in golden().state_dict.items()}
    ours = convert_state_dict(read_checkpoint(save(tmp_path / "a.pt", checkpoint(half)))["model"], config)
    assert {t.dtype for name, t in ours.items() if name != "input_norm.num_batches_tracked"} == {torch.float32}
    assert ours["input_norm.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(ours["patch_embed.weight"], golden().state_dict["post_extract_proj.weight"].half().float())


def official_table(tokens, width):
    """The paper's formula as SPEC.md states it, with integer positions as in the official code."""
    div = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    table = torch.zeros(1, tokens, width)
    table[0, :, 0::2] = torch.sin(torch.arange(tokens)[:, None] * div)
    table[0, :, 1::2] = torch.cos(torch.arange(tokens)[:, None] * div)
    return table


def test_convert_state_dict_differing_position_table_is_kept():
    config = fairseq_config(
        {**golden().options, "cfg/model/use_post_enc_proj": True, "cfg/model/decoder_embed_dim": 32}
    )
    official = {
        **{name: t for name, t in golden().state_dict.items() if not name.startswith(("decoder", "final_proj"))},
        **{name: t for name, t in narrow_decoder(golden().state_dict).items()},
    }
    tables = {"enc_sine_pos_embed.pe": official_table(48000, 64), "dec_sine_pos_embed.pe": official_table(48000, 32)}
    names = {"encoder_positions.table", "decoder_positions.table"}
    without = convert_state_dict(official, config)
    assert not names & without.keys()
    assert without.keys() == convert_state_dict({**official, **tables}, config).keys()
    rounded = convert_state_dict({**official, **{name: t.half() for name, t in tables.items()}}, config)
    assert rounded.keys() == without.keys() | names
    assert torch.equal(rounded["encoder_positions.table"], tables["enc_sine_pos_embed.pe"][0].half().float())
    assert torch.equal(rounded["decoder_positions.table"], tables["dec_sine_pos_embed.pe"][0].half().float())
    assert rounded["decoder_positions.table"].dtype == torch.float32
    one_value = tables["enc_sine_pos_embed.pe"].clone()
    one_value[0, -1, -1] = torch.nextafter(one_value[0, -1, -1], torch.tensor(2.0))
    kept = convert_state_dict({**official, "enc_sine_pos_embed.pe": one_value}, config)
    assert kept.keys() == without.keys() | {"encoder_positions.table"}


def narrow_decoder(state_dict, width=32):
    """The decoder's tensors cut to ``width``."""
    narrow = {}
    for name, tensor in state_dict.items():
        if name.startswith("decoder"):
            narrow[name] = tensor[tuple(slice(width) if n == 64 else slice(None) for n in tensor.shape)]
        elif name.startswith("final_proj"):
            narrow[name] = tensor[:, :width] if tensor.ndim == 2 else tensor
    narrow["post_enc_proj.weight"], narrow["post_enc_proj.bias"] = torch.ones(width, 64), torch.ones(width)
    return narrow


def test_sinusoid_full_size_matches_official_table():
    """Bit for bit, so that conversion of the base model's fp32 checkpoint keeps no table."""
    assert torch.equal(official_table(48000, 768)[0], sinusoid(48000, 768))


def test_convert_state_dict_unused_entries_are_optional():
    config = fairseq_config(golden().options)
    bare = {name: tensor for name, tensor in golden().state_dict.items() if name not in UNUSED}
    extra = {f"{side}_sine_pos_embed._float_tensor": torch.zeros(1) for side in ("enc", "dec")}
    assert (
        convert_state_dict(bare, config).keys() == convert_state_dict({**golden().state_dict, **extra}, config).keys()
    )


def test_convert_state_dict_all_problems_are_listed():
    config = fairseq_config(golden().options)
    official = golden().state_dict
    del official["encoder.layers.1.fc2.bias"], official["batch_norm.running_var"]
    official["post_enc_proj.weight"] = torch.zeros(64, 64)
    official["encoder.layers.3.fc1.bias"] = torch.zeros(128)
    official["encoder.version"] = torch.zeros(1)
    official["encoder.layers.0.self_attn.k_proj.weight"] = torch.zeros(64, 32)
    official["final_proj_classification.bias"] = torch.zeros(1)
    official["dec_sine_pos_embed.pe"] = torch.zeros(48000, 64)
    official["decoder_mask_emb"] = torch.zeros(64, dtype=torch.int8)
    official["encoder.layer_norm.bias"] = None
    with pytest.raises(ValueError) as error:
        convert_state_dict(official, config)
    assert str(error.value).split(": ", 1)[1].split("; ") == [
        "missing encoder.layers.1.fc2.bias",
        "missing batch_norm.running_var",
        "unexpected post_enc_proj.weight",
        "unexpected encoder.layers.3.fc1.bias",
        "unexpected encoder.version",
        "encoder.layer_norm.bias is None, expected a tensor",
        "encoder.layers.0.self_attn.k_proj.weight has shape (64, 32), expected (64, 64)",
        "decoder_mask_emb has dtype torch.int8, expected floating point",
        "final_proj_classification.bias has shape (1,), expected (256,)",
        "dec_sine_pos_embed.pe has shape (48000, 64), expected (1, tokens, 64)",
    ]
    assert len(golden().state_dict) == len(golden().section("state_dict/")), "the golden is unchanged"


@pytest.mark.parametrize("shape", [(), (1, 0, 64), (2, 5, 64), (1, 5, 63), (1, 5, 64, 1)])
def test_convert_state_dict_position_table_of_wrong_shape_is_rejected(shape):
    with pytest.raises(ValueError, match=r"enc_sine_pos_embed.pe has shape .*, expected \(1, tokens, 64\)"):
        convert_state_dict(
            {**golden().state_dict, "enc_sine_pos_embed.pe": torch.zeros(shape)}, fairseq_config(golden().options)
        )


@pytest.mark.parametrize("separator", ["/", "."])
@pytest.mark.parametrize("prefix", ["cfg", ""])
def test_fairseq_config_sectioned_and_nested_options_are_read(separator, prefix):
    case = Golden("mae_ast_prenorm_proj")
    expected = fairseq_config(case.options)
    options = {key: value for key, value in case.options.items() if key.startswith("cfg/")}
    flat = {key.removeprefix("" if prefix else "cfg/").replace("/", separator): x for key, x in options.items()}
    assert fairseq_config(flat) == expected
    nested = {}
    for key, value in options.items():
        _, section, name = key.split("/")
        nested.setdefault(section, {})[name] = value
    assert fairseq_config({"cfg": nested}) == fairseq_config(nested) == expected


class ForeignArgs:
    """Stand-in for a class of a user's training code."""


def test_read_checkpoint_foreign_args_with_valid_cfg_are_ignored(tmp_path):
    case = Golden("mae_ast_patch_small")
    torch.save({"cfg": {"model": {"a": 1}}, "args": ForeignArgs(), "model": case.state_dict}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt")["cfg"] == {"model": {"a": 1}}
    torch.save({"cfg": None, "args": ForeignArgs(), "model": case.state_dict}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="ForeignArgs"):
        read_checkpoint(tmp_path / "b.pt")
