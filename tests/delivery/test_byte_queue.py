"""The queue: bounded, in order, and never in the way of another thread."""

from __future__ import annotations

import threading
from collections import deque

from qitos_mlflow.delivery.byte_queue import ITEM_OVERHEAD_BYTES, Barrier, ByteQueue, Item


def drain(queue: ByteQueue, *, wait: bool = True) -> list[Item | Barrier]:
    taken: deque[Item | Barrier] = deque()
    queue.drain(taken, wait=wait)
    return list(taken)


def payloads(items: list[Item | Barrier]) -> list[bytes]:
    return [item.payload for item in items if isinstance(item, Item)]


def test_bound_is_in_bytes_and_spares_what_is_to_be_kept() -> None:
    """When full the newest are refused, `keep` ones never, and draining makes room again."""
    queue = ByteQueue(3 * (10 + ITEM_OVERHEAD_BYTES))
    assert [queue.offer(b"0123456789") for _ in range(4)] == [True, True, True, False]
    assert queue.offer(b"x" * 1000, keep=True)
    assert len(drain(queue)) == 4
    assert queue.offer(b"0123456789")


def test_one_payload_larger_than_the_bound_is_refused() -> None:
    """No single span can break the bound."""
    queue = ByteQueue(1000)
    assert not queue.offer(b"x" * 1000)
    assert drain(queue, wait=False) == []


def test_a_drain_is_bounded_and_leaves_the_rest_counted() -> None:
    """The spooling thread takes about 256 KiB at once; the rest still counts against the bound."""
    queue = ByteQueue(1024 * 1024)
    big = b"x" * 150_000
    for _ in range(6):
        assert queue.offer(big)
    assert not queue.offer(big)
    assert len(drain(queue)) == 2
    assert queue.offer(big)
    assert queue.offer(big)
    assert not queue.offer(big)


def test_order_is_kept_for_each_thread_and_nothing_is_lost() -> None:
    """Payloads of one thread stay in order whatever the others do; all of them arrive."""
    queue = ByteQueue(64 * 1024 * 1024)
    done = Barrier()
    seen: list[bytes] = []

    def consume() -> None:
        while not done.reached.is_set():
            for item in drain(queue):
                if isinstance(item, Item):
                    seen.append(item.payload)
                else:
                    item.reached.set()

    def produce(name: int) -> None:
        for n in range(2000):
            assert queue.offer(b"%d %d" % (name, n))

    consumer = threading.Thread(target=consume)
    consumer.start()
    producers = [threading.Thread(target=produce, args=(name,)) for name in range(4)]
    for producer in producers:
        producer.start()
    for producer in producers:
        producer.join()
    queue.put(done)
    consumer.join()
    for name in range(4):
        mine = [payload for payload in seen if payload.startswith(b"%d " % name)]
        assert mine == [b"%d %d" % (name, n) for n in range(2000)]


def test_a_barrier_ends_the_linger() -> None:
    """A flush does not wait for payloads to gather."""
    queue = ByteQueue(1000)
    lingered = threading.Event()

    def linger() -> None:
        queue.linger(60.0)
        lingered.set()

    thread = threading.Thread(target=linger, daemon=True)
    thread.start()
    queue.put(Barrier())
    assert lingered.wait(30)
    thread.join()


def test_a_batch_ends_where_the_queue_is_empty() -> None:
    """Draining without waiting returns at once, with what there is."""
    queue = ByteQueue(1000)
    assert drain(queue, wait=False) == []
    queue.offer(b"a")
    queue.offer(b"b")
    assert payloads(drain(queue, wait=False)) == [b"a", b"b"]
