"""Opening a model in llama.cpp: quiet, with threads chosen, and with its failures explained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from skipcat_edge.abort import ctrl_c_at_the_end
from skipcat_edge.cores import usable_cores
from skipcat_edge.errors import UserError
from skipcat_edge.format import ARCHITECTURE_PREFIX, KEY_ARCHITECTURE, field_value
from skipcat_edge.gguf_file import open_gguf, require_gguf
from skipcat_edge.llama_log import keep_log
from skipcat_edge.rpc import close_at_exit, connected, lost_server
from skipcat_edge.runtime.check import BUILD_COMMAND

BATCH = 512
CONTEXT_STEP = 256  # llama.cpp rounds contexts up to this


@dataclass(frozen=True)
class ModelInfo:
    """What a GGUF file says about its model, read without llama.cpp."""

    architecture: str
    """llama.cpp's name, without this format's prefix."""
    context_length: int
    """Tokens the model was trained for; 0 where the file does not say."""
    embedding: bool
    """It gives sentence embeddings, not next tokens."""
    pooled: bool
    """The file says how token embeddings are pooled."""


def model_info(path: Path) -> ModelInfo:
    """Read `path`'s metadata. Raises UserError if it is missing or not a sound GGUF file."""
    from gguf import Keys

    reader = open_gguf(path)
    architecture = str(field_value(reader, KEY_ARCHITECTURE) or "").removeprefix(ARCHITECTURE_PREFIX)

    def value(key: str) -> Any:
        return field_value(reader, key.format(arch=architecture))

    pooled = bool(value(Keys.LLM.POOLING_TYPE))
    context_length = value(Keys.LLM.CONTEXT_LENGTH)
    return ModelInfo(
        architecture=architecture,
        context_length=context_length if isinstance(context_length, int) else 0,
        embedding=pooled or value(Keys.Attention.CAUSAL) is False,
        pooled=pooled,
    )


def default_threads() -> int:
    """One thread for each physical core that this process may use."""
    import psutil

    usable = usable_cores()
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


def import_llama_cpp() -> Any:
    """The llama_cpp module, with its log kept instead of printed.

    Raises UserError where it is not installed or its library does not load.
    """
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        missing = "llama_cpp" if error.name == "llama_cpp" else f"llama_cpp's dependency {error.name}"
        raise UserError(f"{missing} is not installed; run `{BUILD_COMMAND}`.") from None
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise UserError(f"llama_cpp does not load ({error}); run `{BUILD_COMMAND}`.") from None
    keep_log()
    return llama_cpp


def open_model(path: Path, *, context: int, batch: int = BATCH, ubatch: int = BATCH,
               threads: int | None = None, embedding: bool = False, pooled: bool = True,
               vocabulary_only: bool = False, needs_vocabulary: bool = True) -> Any:
    """Load `path` as a llama_cpp.Llama, its layers on the servers that `rpc.connect` has connected, if any.

    Args:
        context: tokens that fit in it; rounded up to llama.cpp's step of 256.
        batch: most tokens of one llama_decode; `ubatch` of them are computed at a time.
        embedding: return pooled embeddings, all tokens of a batch computed at once.
        pooled: the file names its pooling; otherwise the mean is used.
        vocabulary_only: no weights; good for tokenising and nothing else.
        needs_vocabulary: there will be text; a file without a vocabulary ends the process there.

    Raises:
        UserError: the file is missing, not GGUF, or refused by llama.cpp (with its reason and
            the tensor it names); llama_cpp is not installed or not patched; not enough memory.
    """
    require_gguf(path)
    llama_cpp = import_llama_cpp()
    log = keep_log()
    log.clear()
    threads = threads or default_threads()
    try:
        with ctrl_c_at_the_end(), _no_templates(llama_cpp):
            llama = llama_cpp.Llama(
                str(path), n_ctx=-(-context // CONTEXT_STEP) * CONTEXT_STEP, n_batch=batch,
                n_ubatch=batch if embedding else ubatch, n_threads=threads, n_threads_batch=threads,
                embedding=embedding, vocab_only=vocabulary_only, verbose=False,
                n_gpu_layers=-1 if connected() else 0,
                flash_attn=True,  # llama.cpp's own default, not llama_cpp's
                pooling_type=(llama_cpp.LLAMA_POOLING_TYPE_MEAN if embedding and not pooled
                              else llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED),
            )
    except Exception as error:
        raise _load_error(path, context, str(error), log.reason(), llama_cpp) from None
    if connected():
        close_at_exit(llama)
    if llama_cpp.llama_model_has_encoder(llama.model):
        raise UserError(f"{path} is an encoder-decoder model; only decoders and encoders are supported.")
    kind = llama_cpp.llama_vocab_type(llama_cpp.llama_model_get_vocab(llama.model))
    if needs_vocabulary and kind == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        raise UserError(f"{path} has no vocabulary, so it can neither read nor write text; convert the model "
                        "again.")
    return llama


@contextmanager
def _no_templates(llama_cpp: Any) -> Iterator[None]:
    """Llama without the file's chat templates, which it would compile: jinja2 computes what is constant in
    one, however long that takes. They are chat_template's."""
    def formatter(**_: Any) -> Any:
        return SimpleNamespace(to_chat_handler=lambda: None)

    module = llama_cpp.llama_chat_format
    theirs, module.Jinja2ChatFormatter = module.Jinja2ChatFormatter, formatter
    try:
        yield
    finally:
        module.Jinja2ChatFormatter = theirs


def open_generative(path: Path, context: int, threads: int | None = None) -> Any:
    """Load a model that continues text. Raises UserError as `open_model`, and for embedding models."""
    if model_info(path).embedding:
        raise UserError(f"{path} is an embedding model and writes no text; use `skipcat-edge eval` on it.")
    return open_model(path, context=context, threads=threads)


def open_embedding(path: Path, context: int, threads: int | None = None, *,
                   needs_vocabulary: bool = True) -> Any:
    """Load a model that embeds text of up to `context` tokens. Raises UserError as `open_model`."""
    return open_model(path, context=context, batch=context, threads=threads, embedding=True,
                      pooled=model_info(path).pooled, needs_vocabulary=needs_vocabulary)


def decode_error(raised: str) -> UserError:
    """The error for a llama_decode that failed, with llama.cpp's reason or else `raised`."""
    reason = keep_log().reason() or raised
    return lost_server(reason) or UserError(
        f"llama.cpp could not compute a batch: {reason}; free memory or use a smaller context.")


def _load_error(path: Path, context: int, raised: str, said: str, llama_cpp: Any) -> UserError:
    reason = said or raised.rstrip(".")
    if lost := lost_server(reason):
        return lost
    unknown = re.search(rf"unknown model architecture: '({ARCHITECTURE_PREFIX}[^']*)'", reason)
    if unknown:
        return UserError(
            f"{path} has the architecture {unknown[1]}, which the installed llama_cpp "
            f"{llama_cpp.__version__} does not know; run `{BUILD_COMMAND}`."
        )
    if "but this runtime" in reason:
        return UserError(
            f"{path} cannot be loaded: {reason}; update skipcat-edge, then run `{BUILD_COMMAND}`."
        )
    if "low-rank" in reason:
        return UserError(f"{path} cannot be run: {reason}; convert it again with this version.")
    if "llama_context" in raised:
        return UserError(
            f"{path}: a context of {context} tokens cannot be created: {reason}; use a smaller one."
        )
    return UserError(f"{path} cannot be loaded: {reason}; convert or copy it again.")
