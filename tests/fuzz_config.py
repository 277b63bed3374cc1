# SPDX-License-Identifier: Apache-2.0
"""Hostile ``config.json`` files: is the order of parameters worked out, or refused in one sentence?

Usage: ``python fuzz_config.py SEED FIRST STEP COUNT SECONDS``; cases FIRST, FIRST + STEP, ... One line a case: number,
outcome, seconds; what breaks a rule begins with "BAD". The model is built as in :mod:`pss_param.meta_model`, but in a
fork of this process, which has imported the libraries already: hundreds of cases a minute instead of ten.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random

from fuzz_mutations import NUMBERS, damage_json
from fuzz_worker import complaint

from pss_param import meta_model
from pss_param.errors import CheckpointError
from pss_param.param_order import order_from_config

MARKER = "payload-has-run"
CASE_SECONDS = 60
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32, "intermediate_size": 24}
SEEDS = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 2, **SMALL,
        "max_position_embeddings": 16, "tie_word_embeddings": True, "rope_theta": 10000.0, "torch_dtype": "float32",
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2,
        "vocab_size": 32, "n_positions": 16,
    },
    "bert": {
        "architectures": ["BertForSequenceClassification"], "model_type": "bert", **SMALL, "num_labels": 3,
        "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2},
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_key_value_heads": 2, **SMALL,
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
    },
    "detr": {
        "architectures": ["DetrForObjectDetection"], "model_type": "detr", "use_timm_backbone": False, "d_model": 16,
        "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 4,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "use_pretrained_backbone": False,
        "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    },
}  # fmt: skip
CODE = f"open({MARKER!r}, 'w').close()\nraise SystemExit('the payload has run')\n"
AUTO = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "other/repository--evil.Model"}
LURES = (
    {"auto_map": AUTO}, {"auto_map": AUTO, "model_type": "evil"}, {"auto_map": AUTO, "architectures": ["Model"]},
    {"trust_remote_code": True, "auto_map": AUTO}, {"auto_map": 5}, {"auto_map": {"AutoConfig": ["evil.Config"]}},
    {"_attn_implementation": "someone/kernel"}, {"attn_implementation": "evil"}, {"_attn_implementation": 3},
    {"attn_implementation": {"": "kernels-community/flash-attn:evil"}}, {"experts_implementation": "evil/x"},
    {"use_pretrained_backbone": True, "backbone": "evil"}, {"backbone": "./evil", "use_timm_backbone": True},
    {"backbone": "evil", "backbone_config": None, "use_pretrained_backbone": True},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"quantization_config": {"quant_method": "evil"}},
    {"torch_dtype": "os.system"}, {"dtype": "evil"}, {"_name_or_path": "evil"}, {"_commit_hash": "../../evil"},
    {"architectures": ["Trainer"]}, {"architectures": ["PreTrainedModel"]}, {"architectures": ["__class__"]},
    {"architectures": ["AutoModelForCausalLM"]}, {"architectures": ["pipeline"]}, {"architectures": ["os.system"]},
    {"architectures": ["BertModel"]}, {"architectures": ["T5ForConditionalGeneration"]}, {"architectures": {"0": 1}},
    {"architectures": None}, {"architectures": "LlamaForCausalLM"}, {"architectures": [[]]}, {"model_type": "t5"},
    {"model_type": ["llama"]}, {"model_type": "clip"}, {"model_type": None}, {"model_type": "../evil"},
    {"text_config": {"model_type": "llama", "auto_map": AUTO}}, {"sub_configs": {"x": 1}}, {"pruned_heads": {"0": [1]}},
    {"return_dict": "no"}, {"problem_type": 7}, {"is_encoder_decoder": "yes"}, {"rope_scaling": {"rope_type": "evil"}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 0}}, {"hidden_act": "evil"}, {"hidden_act": "__import__('os')"},
    {"layer_types": ["evil"] * 3}, {"attention_dropout": "x"}, {"initializer_range": -1}, {"__class__": "x"},
    {"to_dict": 1}, {"attribute_map": {"hidden_size": "vocab_size"}}, {"base_config_key": "x"}, {"self": 1},
)  # fmt: skip
HUGE = (10**5, 10**6, 10**8, 2**31, 2**40, 2**62, 2**63, 10**30, -1, 0, 1.5, 1e308, "2", None, True, [3], {})
TEXTS = (b"", b"{", b"[]", b"null", b"7", b'"x"', b"\xff\xfe{}", b"\x80\2}.", b'{"a":' * 99_999, b"[" * 10**6, b"{}")


def hostile(rng: Random) -> tuple[str, bytes]:
    """Name of the seed and text of a damaged configuration."""
    seed = rng.choice(list(SEEDS))
    content = dict(SEEDS[seed])
    kind = rng.randrange(12)
    if kind == 0:
        return seed, rng.choice((*TEXTS, json.dumps(content).encode()[: rng.randrange(200)]))
    if kind < 5:
        content |= rng.choice(LURES)
    if kind in (4, 5, 6, 7):
        numbers = [key for key, value in content.items() if type(value) is int]
        for key in rng.sample([*numbers, "num_labels", "max_length", "pad_token_id", "chunk_size"], rng.choice((1, 2))):
            content[key] = rng.choice((*HUGE, *NUMBERS))
    text = json.dumps(content).encode()
    return seed, damage_json(text, rng, tuple(SEEDS)) if kind > 7 else text


def forked(text: str, count: int) -> str:
    """Stands in for the process that the product starts."""
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        child = os.fork()
        if child == 0:
            _child(text, count, out.fileno(), err.fileno())
        end = time.monotonic() + CASE_SECONDS
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise ValueError(f"it took more than {CASE_SECONDS} seconds")
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(ended[1])
        for file in (out, err):
            file.seek(0)
        if code:
            raise ValueError(meta_model.last_words(err.read().decode(errors="replace"), code))
        return out.read().decode(errors="replace")


def _child(text: str, count: int, out: int, err: int) -> None:
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        meta_model.main(text, count)
        sys.stdout.flush()
        code = 0
    except BaseException:  # ruff: ignore[blind-except] - as the interpreter does at the end of a program
        os.write(2, traceback.format_exc().encode(errors="backslashreplace"))
    finally:
        os._exit(code)


def run_case(label: str, folder: Path, counts: dict[str, int]) -> tuple[str, str]:
    """Work out the order for one configuration; returns the outcome and what is wrong with it."""
    rng = Random(label)
    seed, text = hostile(rng)
    (folder / "config.json").write_bytes(text)
    groups = [counts[seed]] if rng.randrange(5) else rng.choice(([20], [15, 5], [10**6, 3]))
    try:
        order_from_config(folder, groups)
        outcome, wrong = "done", ""
    except CheckpointError as error:
        outcome, wrong = _why(str(error)), complaint(str(error), str(folder))
    except Exception:  # ruff: ignore[blind-except] - any other exception is what is looked for
        outcome, wrong = "Exception", traceback.format_exc(limit=-8)
    if Path(MARKER).exists() or (folder / MARKER).exists():
        wrong = "a payload has run"
    return f"{seed}: {outcome}", f"{text[:3000]!r}\n{wrong}" if wrong else ""


def _why(message: str) -> str:
    for words, outcome in (("seconds", "too slow"), ("MemoryError", "memory"), ("status", "killed")):
        if words in message:
            return outcome
    return "refused"


def main(seed: str, first: int, step: int, count: int, seconds: float) -> None:
    meta_model._ask, meta_model.CPU_SECONDS = forked, 5
    import transformers.trainer

    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        folder = Path(place) / "case"
        folder.mkdir()
        (folder / "evil.py").write_text(CODE)
        # What is loaded at the first use, and proof that the seeds are sound.
        models = {seed: meta_model.build(content, 10**5) for seed, content in SEEDS.items()}
        counts = {seed: sum(p.requires_grad for p in model.parameters()) for seed, model in models.items()}
        end = time.monotonic() + seconds
        for number in range(first, first + count * step, step):
            if time.monotonic() > end:
                break
            start = time.monotonic()
            outcome, wrong = run_case(f"{seed}/{number}", folder, counts)
            took = f"{time.monotonic() - start:.1f}"
            print(f"{number} BAD {outcome} {took}\n{wrong}\nEND" if wrong else f"{number} {outcome} {took}", flush=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
        print(f"peak {peak} MiB transformers {transformers.__version__}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5]))
