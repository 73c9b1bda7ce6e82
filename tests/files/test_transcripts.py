"""HH transcripts as messages and an answer."""

from __future__ import annotations

import pytest

from dar.files.transcripts import Transcript, parse_transcript, transcript_pair

BEFORE = "\n\nHuman: Is it raining?\n\nAssistant: No.\n\nHuman: And now?\n\nAssistant:"


def test_transcript_becomes_messages_and_the_last_answer():
    assert parse_transcript(BEFORE + " Yes.\nA lot. ") == Transcript(
        [
            {"role": "user", "content": "Is it raining?"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "And now?"},
        ],
        "Yes.\nA lot.",
    )


def test_turns_of_one_speaker_are_one_message():
    found = parse_transcript("\n\nHuman: One.\n\nHuman: Two.\n\nAssistant: Three.\n\nAssistant: Four.")
    assert found == Transcript(
        [{"role": "user", "content": "One.\n\nTwo."}, {"role": "assistant", "content": "Three."}],
        "Four.",
    )


def test_a_pair_says_which_of_its_columns_is_no_transcript():
    chosen, rejected = transcript_pair({"chosen": BEFORE + " Yes.", "rejected": BEFORE + " No."})
    assert (chosen.answer, rejected.answer, chosen.prompt == rejected.prompt) == ("Yes.", "No.", True)
    with pytest.raises(ValueError, match=r"'rejected' is no transcript of the hh format.*column 'prompt'.*: 'None'"):
        transcript_pair({"chosen": BEFORE + " Yes."})
