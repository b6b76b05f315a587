"""AsyncEngine on a tiny model: what a task gets is what its request gives alone, whatever the tasks beside it do."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import gc
import itertools
import pickle
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from op_cases import SEED

from cupaged import LLM, AsyncEngine, CupagedError, InvalidArgument, RequestOutput, SamplingParams
from cupaged.engine.outputs import CompletionOutput, Logprob, RequestMetrics


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    config = {**tiny_models.CONFIGS["llama-gqa"], "max_position_embeddings": 1024}
    folder = tiny_models.write_model(tmp_path_factory.mktemp("models") / "llama", config)
    return LLM(folder, device="cpu", kv_memory="12MB", max_num_seqs=8, enable_prefix_caching=False)


@pytest.fixture(autouse=True)
def everything_is_given_back(llm):
    yield
    assert llm.pool_stats().used_blocks == 0
    assert [thread.name for thread in threading.enumerate() if "cupaged" in thread.name] == []


def random_prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(256) for _ in range(rng.randint(1, 60))]


def same(llm: LLM, got: RequestOutput, alone: RequestOutput) -> bool:
    """Whether both hold the same completion, up to a near-tie, which the shape of a batch may decide."""
    a, b = got.outputs[0], alone.outputs[0]
    if a == b:
        return True
    at = next(index for index, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y)
    logits = llm.logits([*got.prompt_token_ids, *a.token_ids[:at]])[-1]
    return abs(logits[a.token_ids[at]] - logits[b.token_ids[at]]) < 0.02


async def last(engine: AsyncEngine, *args: object, **kwargs: object) -> RequestOutput:
    output = None
    async for output in engine.generate(*args, **kwargs):  # noqa: B007
        pass
    return output


async def until(holds: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


async def until_added(engine: AsyncEngine, count: int) -> None:
    """Until the engine has so many unfinished requests: a prompt is encoded first, which takes as long as it takes."""
    while (stats := await engine.stats()).num_running + stats.num_waiting < count:
        await asyncio.sleep(0.002)


def test_many_tasks_get_what_each_request_gives_alone(llm):
    rng = random.Random(SEED)
    requests = [(random_prompt(rng), greedy(rng.randint(1, 30))) for _ in range(24)]
    alone = [llm.generate(prompt, params)[0] for prompt, params in requests]

    async def ask(engine: AsyncEngine, number: int) -> RequestOutput:
        await asyncio.sleep(rng.random() * 0.2)
        return await last(engine, *requests[number])

    async def main() -> list[RequestOutput]:
        async with AsyncEngine(llm) as engine:
            return await asyncio.gather(*(ask(engine, number) for number in range(len(requests))))

    outputs = asyncio.run(main())
    assert all(same(llm, *pair) for pair in zip(outputs, alone, strict=True)), f"CUPAGED_TEST_SEED={SEED}"
    assert len({output.request_id for output in outputs}) == len(requests)
    assert all(output.finished and output.error is None for output in outputs)


def test_snapshots_grow_and_stay_as_they_were(llm):
    params = SamplingParams(n=2, temperature=1, seed=3, max_tokens=40, ignore_eos=True)
    expected = llm.generate("Hello", params)[0]

    async def main() -> list[tuple[RequestOutput, list[tuple[str, list[int]]]]]:
        async with AsyncEngine(llm) as engine:
            outputs = engine.generate("Hello", params, request_id="mine")
            return [(out, [(c.text, list(c.token_ids)) for c in out.outputs]) async for out in outputs]

    seen = asyncio.run(main())
    assert len(seen) > 3
    assert [out.finished for out, _ in seen] == [False] * (len(seen) - 1) + [True]
    for index in range(2):
        ids = [out.outputs[index].token_ids for out, _ in seen]
        assert ids == [then[index][1] for _, then in seen]  # not changed since it was handed out
        assert all(len(a) <= len(b) and b[: len(a)] == a for a, b in itertools.pairwise(ids))
        assert seen[-1][0].outputs[index] == expected.outputs[index]
    out = seen[-1][0]
    assert (out.request_id, out.prompt, out.prompt_token_ids) == ("mine", "Hello", expected.prompt_token_ids)
    assert out.metrics.num_generated_tokens == 80


def test_what_is_read_of_a_snapshot_later_is_what_there_was_then(llm):
    params = SamplingParams(temperature=1, seed=3, max_tokens=30, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    expected = llm.generate("Hello", params)[0]

    async def main() -> tuple[list[str], list[RequestOutput]]:
        async with AsyncEngine(llm) as engine:
            pairs = [(out.outputs[0].text, out) async for out in engine.generate("Hello", params)]
            return [list(column) for column in zip(*pairs, strict=True)]

    texts, seen = asyncio.run(main())
    assert len(seen) > 3
    for out, text in zip(seen, texts, strict=True):
        completion, count = out.outputs[0], out.metrics.num_generated_tokens
        assert completion.text == text
        assert completion.token_ids == expected.outputs[0].token_ids[:count]
        assert completion.logprobs == expected.outputs[0].logprobs[:count]
        assert len(out.metrics.inter_token_times) == count - 1
        assert out.prompt_logprobs == expected.prompt_logprobs
    seen[-2].outputs[0].token_ids.append(7)  # it is the reader's
    assert seen[-1].outputs == expected.outputs


def grown(count: int) -> CompletionOutput:
    return CompletionOutput(0, "ab" * count, list(range(count)), [{7: Logprob(-1.0, 1, "a")}] * count, -1.0 * count)


@pytest.mark.parametrize(
    "same",
    [
        lambda output: output,
        copy.copy,
        copy.deepcopy,
        dataclasses.replace,
        lambda output: pickle.loads(pickle.dumps(output)),
        lambda output: output.snapshot(),
    ],
    ids=["itself", "copy", "deepcopy", "replace", "pickle", "snapshot"],
)
def test_a_snapshot_is_as_good_as_what_it_is_a_snapshot_of(same):
    live, expected = grown(5), grown(5)
    snapshot = live.snapshot()
    live.token_ids.append(5)
    live.logprobs.append({})
    live.text += "ab"
    snapshot = same(snapshot)
    assert (repr(snapshot), snapshot) == (repr(expected), expected)
    assert dataclasses.asdict(snapshot) == dataclasses.asdict(expected)
    snapshot.token_ids.append(9)
    assert live.token_ids == list(range(6))
    with pytest.raises(AttributeError, match="nothing"):
        _ = snapshot.nothing


def test_a_snapshot_costs_the_same_however_much_there_is():
    live, metrics = grown(10**6), RequestMetrics(0.0, inter_token_times=[0.1] * 10**6)
    tracemalloc.start()
    snapshots = [(live.snapshot(), metrics.snapshot()) for _ in range(100)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6
    assert [len(output.token_ids) for output, _ in snapshots] == [10**6] * 100


def test_a_slow_reader_gets_the_end_and_delays_nobody(llm):
    async def main() -> tuple[list[RequestOutput], RequestOutput]:
        async with AsyncEngine(llm) as engine:
            slow = engine.generate([1, 2, 3], greedy(30))
            first = await anext(slow)
            other = await last(engine, [4, 5], greedy(300))  # 30 tokens of the slow one pass meanwhile, unread
            return [first, *[out async for out in slow]], other

    outputs, other = asyncio.run(main())
    assert len(other.outputs[0].token_ids) == 300
    assert len(outputs) <= 4
    assert outputs[-1].outputs == llm.generate([1, 2, 3], greedy(30))[0].outputs


def test_without_parameters_the_models_own(llm):
    async def main() -> RequestOutput:
        async with AsyncEngine(llm) as engine:
            return await last(engine, {"prompt_token_ids": [9] * 1000})

    assert asyncio.run(main()).outputs == llm.generate([9] * 1000)[0].outputs


def test_the_smallest_priority_goes_first(llm):
    async def main() -> list[str]:
        async with AsyncEngine(llm) as engine:
            order = []

            async def ask(name: str, priority: int) -> None:
                await last(engine, [1, 2], greedy(20), priority=priority)
                order.append(name)

            busy = [engine.generate([n], greedy(900)) for n in range(8)]  # as many as run at a time
            await asyncio.gather(*map(anext, busy))
            later = [asyncio.create_task(ask(name, priority)) for name, priority in (("last", 2), ("second", 1), ("first", 0))]
            await until_added(engine, 8 + 3)
            await busy[0].aclose()  # one place is free from now on
            await asyncio.gather(*later)
            for outputs in busy[1:]:
                await outputs.aclose()
            with pytest.raises(InvalidArgument, match="priority"):
                await ask("never", "high")
            return order

    assert asyncio.run(main()) == ["first", "second", "last"]


# ---- leaving early


@pytest.fixture
def slow(llm, monkeypatch):
    """Steps take long: what is given back within a few seconds has not simply come to its end."""
    step = llm.step
    monkeypatch.setattr(llm, "step", lambda: (time.sleep(0.02), step()))


async def hold(engine: AsyncEngine, started: asyncio.Event, busy_elsewhere: bool) -> None:
    async for _ in engine.generate([1, 2, 3], greedy(900)):
        started.set()
        if busy_elsewhere:
            await asyncio.sleep(1000)


@pytest.mark.parametrize("busy_elsewhere", [False, True], ids=["waiting for the next output", "waiting for something else"])
def test_a_cancelled_task_frees_its_blocks(llm, slow, busy_elsewhere):
    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            started = asyncio.Event()
            task = asyncio.create_task(hold(engine, started, busy_elsewhere))
            await started.wait()
            assert llm.pool_stats().used_blocks > 0
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            del task
            gc.collect()
            await until(lambda: llm.pool_stats().used_blocks == 0)

    asyncio.run(main())


def test_tasks_cancelled_at_any_moment_leave_nothing_and_disturb_nobody(llm):
    rng = random.Random(SEED)
    prompts = [random_prompt(rng) for _ in range(32)]
    staying = range(0, 32, 4)
    alone = {number: llm.generate(prompts[number], greedy(40))[0] for number in staying}

    async def main() -> dict[int, RequestOutput]:
        async with AsyncEngine(llm) as engine:
            # Texts too: they are encoded in a thread, where a cancellation may fall as well.
            tasks = {
                number: asyncio.create_task(last(engine, prompt if number % 3 else "x" * len(prompt), greedy(40)))
                for number, prompt in enumerate(prompts)
                if number not in staying
            }
            stayed = {number: asyncio.create_task(last(engine, prompts[number], greedy(40))) for number in staying}
            for task in tasks.values():
                await asyncio.sleep(rng.random() * 0.02)
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            results = {number: await task for number, task in stayed.items()}
            await until(lambda: llm.pool_stats().used_blocks == 0)
            return results

    assert all(same(llm, output, alone[number]) for number, output in asyncio.run(main()).items()), f"CUPAGED_TEST_SEED={SEED}"


def test_a_closed_iterator_frees_its_blocks(llm, slow):
    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            async with contextlib.aclosing(engine.generate([1, 2, 3], greedy(900))) as outputs:
                async for _ in outputs:
                    break
            await until(lambda: llm.pool_stats().used_blocks == 0)
            assert (await last(engine, [5], greedy(3))).finished

    asyncio.run(main())


def test_abort_ends_one_request_and_frees_its_blocks_on_return(llm):
    other = llm.generate([4, 5], greedy(100))[0].outputs

    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            beside = asyncio.create_task(last(engine, [4, 5], greedy(100)))
            assert (await beside).outputs == other
            outputs = engine.generate([1, 2, 3], greedy(900), request_id="a")
            await anext(outputs)
            await engine.abort("a")
            assert llm.pool_stats().used_blocks == 0
            *_, end = [out async for out in outputs]
            assert (end.finished, end.outputs[0].finish_reason) == (True, "abort")
            assert 1 <= len(end.outputs[0].token_ids) < 900
            await engine.abort("a")
            await engine.abort("never seen")
            assert (await last(engine, [7], greedy(2), request_id="a")).finished  # the name is free again

    asyncio.run(main())


def test_abort_before_the_prompt_is_encoded(llm, monkeypatch):
    encode, gate = llm.tokenizer.encode, threading.Event()
    monkeypatch.setattr(llm.tokenizer, "encode", lambda text: (gate.wait(20), encode(text))[1])

    async def main() -> RequestOutput:
        async with AsyncEngine(llm) as engine:
            task = asyncio.create_task(last(engine, "Hello", greedy(900), request_id="a"))
            await asyncio.sleep(0.01)
            await engine.abort("a")
            gate.set()
            return await task

    output = asyncio.run(main())
    assert (output.finished, output.outputs[0].finish_reason, output.outputs[0].token_ids) == (True, "abort", [])


# ---- what cannot be used


def test_a_bad_request_is_its_own_tasks_error(llm):
    good = llm.generate([1, 2], greedy(20))[0].outputs
    bad = [
        (("",), "empty"),
        (([1, 260],), "260"),
        (([1] * 1024,), "1024 tokens"),
        ((3.5,), "3.5"),
        (("a\ud800",), "surrogate"),
        (([1], "params"), "params"),
    ]

    async def main() -> list:
        async with AsyncEngine(llm) as engine:
            tasks = [last(engine, *args) for args, _ in bad]
            return await asyncio.gather(*tasks, last(engine, [1, 2], greedy(20)), return_exceptions=True)

    *errors, output = asyncio.run(main())
    assert output.outputs == good
    for error, (_, says) in zip(errors, bad, strict=True):
        assert isinstance(error, InvalidArgument)
        assert says in str(error)


def test_a_request_id_that_is_taken_or_no_string(llm):
    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            first = engine.generate([1], greedy(900), request_id="0")
            await anext(first)
            with pytest.raises(InvalidArgument, match="'0'"):
                await last(engine, [1], greedy(1), request_id="0")
            with pytest.raises(InvalidArgument, match="request_id is 7"):
                await last(engine, [1], greedy(1), request_id=7)
            assert (await last(engine, [1], greedy(1))).request_id != "0"  # a made-up one does not collide
            await first.aclose()

    asyncio.run(main())


def test_a_second_event_loop_is_refused(llm):
    engine = AsyncEngine(llm)
    asyncio.run(last(engine, [1], greedy(1)))
    with pytest.raises(InvalidArgument, match="event loop"):
        asyncio.run(last(engine, [1], greedy(1)))
    asyncio.run(engine.close())


def test_a_step_that_fails_once_is_tried_again(llm, monkeypatch):
    step, steps = llm.step, []

    def fails_at_times() -> None:
        steps.append(None)
        if len(steps) in (1, 5, 7):
            raise RuntimeError("a hiccup")
        step()

    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            expected = await asyncio.gather(*(last(engine, [n], greedy(9)) for n in range(5)))
            monkeypatch.setattr(llm, "step", fails_at_times)
            outputs = await asyncio.gather(*(last(engine, [n], greedy(9)) for n in range(5)))
            assert len(steps) > 7
            assert [output.outputs[0].token_ids for output in outputs] == [each.outputs[0].token_ids for each in expected]

    asyncio.run(main())


def test_a_step_that_fails_twice_is_one_clear_error_for_all(llm, monkeypatch):
    step, steps = llm.step, []

    def fails_from_the_fifth_on() -> None:
        steps.append(None)
        if len(steps) >= 5:
            raise RuntimeError("the device is on fire")
        step()

    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            monkeypatch.setattr(llm, "step", fails_from_the_fifth_on)
            errors = await asyncio.gather(*(last(engine, [n], greedy(900)) for n in range(5)), return_exceptions=True)
            assert {type(error) for error in errors} == {CupagedError}
            assert len({id(error) for error in errors}) == 5
            assert {str(error) for error in errors} == {
                "the engine has stopped: RuntimeError: the device is on fire; close it and make another one"
            }
            assert all(isinstance(error.__cause__, RuntimeError) for error in errors)
            assert llm.pool_stats().used_blocks == 0
            with pytest.raises(CupagedError, match="on fire"):
                await last(engine, [1], greedy(1))
            await engine.abort("anything")
        monkeypatch.undo()
        async with AsyncEngine(llm) as engine:  # the LLM itself can be used again
            assert (await last(engine, [1], greedy(3))).finished

    asyncio.run(main())


# ---- closing


def test_close_ends_what_runs_and_refuses_what_comes(llm):
    async def main() -> None:
        engine = AsyncEngine(llm)
        started = asyncio.Event()
        holder = asyncio.create_task(hold(engine, started, busy_elsewhere=False))
        endless = [asyncio.create_task(last(engine, [n], greedy(900))) for n in range(12)]  # more than run at once
        await started.wait()
        await until_added(engine, 13)
        await engine.close()
        assert llm.pool_stats().used_blocks == 0
        outputs = await asyncio.gather(*endless)
        await holder
        assert {output.outputs[0].finish_reason for output in outputs} == {"abort"}
        with pytest.raises(CupagedError, match="closed"):
            await last(engine, [1], greedy(1))
        await engine.close()
        assert llm.generate([1], greedy(2))[0].finished

    asyncio.run(main())


def test_close_refuses_a_request_whose_prompt_is_still_being_encoded(llm, monkeypatch):
    encode_prompt = llm.encode_prompt
    begun, may_end = threading.Event(), threading.Event()

    def encodes_slowly(prompt):
        begun.set()
        assert may_end.wait(10)
        return encode_prompt(prompt)

    async def main() -> None:
        engine = AsyncEngine(llm)
        monkeypatch.setattr(llm, "encode_prompt", encodes_slowly)
        request = asyncio.create_task(last(engine, [1], greedy(900)))
        await asyncio.to_thread(begun.wait)
        await engine.close()
        may_end.set()
        with pytest.raises(CupagedError, match="closed"):
            await request

    asyncio.run(main())


def test_closing_what_was_never_used(llm):
    async def main() -> None:
        async with AsyncEngine(llm):
            pass

    asyncio.run(main())


def test_a_program_that_forgets_to_close_still_ends(llm):
    code = f"""
import asyncio
from cupaged import LLM, AsyncEngine, SamplingParams
engine = AsyncEngine(LLM({str(llm.path)!r}, device="cpu", kv_memory="4MB"))
async def main():
    async for output in engine.generate([1, 2], SamplingParams(max_tokens=900, ignore_eos=True)):
        break
asyncio.run(main())
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, timeout=60, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
