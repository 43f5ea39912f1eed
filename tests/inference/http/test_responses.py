"""The JSON of answers, where two tokens have one text."""

from typing import Any

from yafsdp_like.inference.engine.request import FinishReason, Token
from yafsdp_like.inference.http.responses import CompletionFormat
from yafsdp_like.inference.text.codec import Piece, PlacedToken


class Names:
    """A codec of which only names are asked."""

    def name_of(self, token: int) -> str:
        return {1: "the", 2: "the", 3: "", 4: "", 5: "bytes:\\xff", 6: "bytes:\\xff"}.get(token, f"t{token}")


def test_tokens_of_one_text_keep_their_log_probabilities() -> None:
    """Prevents: the less probable of two takes the place of the other in an object by text, in silence."""
    codec: Any = Names()
    top = ((1, -0.1), (9, -1.0), (2, -2.0), (3, -3.0), (4, -4.0), (5, -5.0), (6, float("-inf")))
    choice: Any = type("Choice", (), {"index": 0})
    format = CompletionFormat(codec, ("",), has_logprobs=True)
    placed = PlacedToken(Token(2, -2.0, top), text_offset=0)
    logprobs = format.part(choice, Piece("the", (placed,), FinishReason.LENGTH))["logprobs"]
    assert logprobs["tokens"] == ["the"]
    assert logprobs["top_logprobs"] == [
        {
            "the": -0.1,
            "t9": -1.0,
            "token_id:2": -2.0,
            "": -3.0,
            "token_id:4": -4.0,
            "bytes:\\xff": -5.0,
            "token_id:6": -9999.0,
        }
    ]
