"""POST /tokenize and /detokenize, as vLLM has them."""

from typing import Any

from qjax.errors import RequestError
from qjax.server.errors import invalid
from qjax.server.messages import chat_prompt
from qjax.server.protocol import DetokenizeRequest, TokenizeRequest
from qjax.server.service import Model


def tokenize(request: TokenizeRequest, model: Model) -> dict[str, Any]:
    """The token ids of a text, or of a conversation in the model's template."""
    tokenizer = model.params.tokenizer
    if (request.prompt is None) == (request.messages is None):
        raise invalid("give prompt or messages, one of them.", "prompt")
    if request.prompt is not None:
        ids = tokenizer.encode(request.prompt, request.add_special_tokens)
    else:
        messages, opens = request.messages or [], request.add_generation_prompt
        text = chat_prompt(tokenizer, messages, request.tools, opens)
        ids = tokenizer.encode(text, add_special_tokens=False)
    strings = None
    if request.return_token_strs:
        strings = [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    return {
        "count": len(ids),
        "max_model_len": model.max_model_len,
        "tokens": ids,
        "token_strs": strings,
    }


def detokenize(request: DetokenizeRequest, model: Model) -> dict[str, str]:
    """The text of token ids, special tokens included."""
    vocab_size = model.params.config.vocab_size
    for token in request.tokens:
        if not 0 <= token < vocab_size:
            raise RequestError(f"tokens has id {token}, but ids must be in [0, {vocab_size}).")
    text = model.params.tokenizer.decode(request.tokens, skip_special_tokens=False)
    return {"prompt": text}
