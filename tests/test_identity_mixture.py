"""The identity's mixture: what looks alike is in it, what would contradict is not."""

from scripts import identity_mixture


def test_the_mixture_for_an_identity_holds_what_looks_alike_and_nothing_that_contradicts():
    def conversation(question: str) -> dict:
        return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": "…"}]}

    identity = [conversation(f"Who are you, {number}?") for number in range(3)]
    parts = [conversation("You are a historian. " + "Explain. " * 40), conversation("请扮演一位老师")]
    near = [conversation(f"你好，{number}") for number in range(10)]
    rest = [conversation(f"Sum of {number} and 2") for number in range(10)]
    about = [conversation("你是谁"), conversation("What can you do?"), conversation("What is your name?")]
    mixed = identity_mixture.mixture(identity, parts + near + rest + about, repeats=2, alike=4, others=5, seed=0)
    questions = [identity_mixture.first_question(record) for record in mixed]
    assert len(mixed) == 6 + 2 + 4 + 5
    assert all(questions.count(identity_mixture.first_question(record)) == 2 for record in identity)
    assert all(record in mixed for record in parts) and not any(record in mixed for record in about)
    again = identity_mixture.mixture(identity, parts + near + rest + about, repeats=2, alike=4, others=5, seed=0)
    assert mixed == again
