"""Many processes, one run: what `torchrun train.py` adds to a plain `python train.py`.

Every process ("rank") runs the same script on its own device, owns a contiguous share of the environments, and holds the
whole model. They meet in a handful of places, all of them a method of `Ranks`: sums of gradients and statistics, and lists
of small objects. On one process each of these methods is the identity, so the script needs no second path.

Who notices that a rank is gone? Not the collectives: gloo does at once, NCCL waits for its timeout, and a rank in the
middle of a rollout asks nobody for minutes. A short timeout would not help either, because ranks legitimately wait long
for each other (one evaluates while another has finished). So a thread of every rank leaves a heartbeat in torchrun's
key-value store and watches those of the others; see `Ranks._watch`. Collectives may then be as patient as they like.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from datetime import timedelta

import numpy as np

from support.errors import UserError

# torch is imported where it is used: it takes seconds, and `--help` should not.

BEAT = 1.0  # seconds between heartbeats
SILENCE = 20  # of its own beats that a rank waits for somebody else's; a stalled machine stalls both counts
GRACE = 5.0  # seconds that the main thread gets to end by itself (it may be printing the same news) before it is ended
GRACE_STOP = 25.0  # the same after Ctrl-C, where rank 0 may be writing a checkpoint; torchrun kills after 30
PATIENCE = timedelta(hours=2)  # of a collective
MEETING = 600  # seconds until all ranks must have started


class Ranks:
    """This process among all. rank, size: global; local_rank, local_size: on this machine. device: "cpu", "cuda", "cuda:k".

    Methods raise UserError, naming the rank, when another one is gone; KeyboardInterrupt when it was stopped by a signal.
    """

    def __init__(self, rank=0, size=1, local_rank=0, local_size=1, device="cpu"):
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.device = device
        self._ending, self._thread = False, None  # the thread watches from when the ranks have met

    def _meet(self, backend):
        """Find the other ranks through torchrun's store, and start to watch whether they live."""
        import torch.distributed as dist

        # torchrun's, when another rank died: not without a word
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            store = self._agree(dist)
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("collectives", store),
                rank=self.rank,
                world_size=self.size,
                timeout=PATIENCE,
            )
            # A client of its own, because the main thread may sit in a call to the other one.
            self._store = dist.PrefixStore("heartbeat", store.clone())
            self._store.set_timeout(timedelta(seconds=60))
            self._beat()
            dist.barrier()
        except (RuntimeError, KeyError) as exc:
            raise UserError(
                f"rank {self.rank} of {self.size} could not join the others: {_first_line(exc)}"
            ) from exc
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _agree(self, dist):
        """A key-value store that only the ranks of this start read and write.

        torchrun's store outlives a restart, and init_process_group would look for the others under the addresses that
        the dead ones left there (rank 1 did whenever it was there before rank 0). TORCHELASTIC_RESTART_COUNT cannot tell
        starts apart, because a node that lost no rank does not count. So: everybody says hello with a word of its own, and
        rank 0, which torchrun has ended before it starts a new one, answers each word with the name of this start.
        """
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # without torchrun, rank 0 serves
        ours = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store, word = dist.TCPStore(*address, is_master=ours), os.urandom(8).hex()
        until = time.monotonic() + MEETING

        def wait_for(key, meanwhile=lambda: None):  # not store.wait, which does not hear SIGTERM
            while not store.check([key]):
                if time.monotonic() > until:
                    raise RuntimeError(f"not all were there after {MEETING} s")
                meanwhile()
                time.sleep(0.05)

        def answer(r):
            if store.check([f"hello{r}"]):  # perhaps that of a dead one, whose answer nobody will read
                store.set(f"name for {store.get(f'hello{r}').decode()}", word)

        if self.rank:
            store.set(f"hello{self.rank}", word)
            wait_for(f"name for {word}")
            word = store.get(f"name for {word}").decode()
            store.set(f"{word} reached {self.rank}", "")
        else:
            for r in range(1, self.size):
                wait_for(f"{word} reached {r}", lambda r=r: answer(r))
        return dist.PrefixStore(word, store)

    # ---- the collectives ---------------------------------------------------------------------------------------------

    @property
    def is_main_process(self):
        """Is this the rank that writes files and speaks to the terminal?"""
        return self.rank == 0

    def print0(self, *words, **options):
        """`print` on the main process, nothing on the others."""
        if self.is_main_process:
            print(*words, **{"flush": True, **options})

    def share(self, n):
        """This rank's contiguous part of n environments, as a range. n must be divisible by the number of ranks."""
        if n % self.size:
            raise UserError(
                f"{n} environments cannot be spread evenly over {self.size} ranks: make --num-envs a multiple of {self.size}"
            )
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def own_part(self, minibatch, num_envs):
        """A mini-batch over all environments -> this rank's decisions in it, as flat indices into its own rollout.

        minibatch: flat indices t * (num_envs * size) + n. Every rank has `num_envs` environments, one after the other, and
        as mini-batches take the same number of decisions of every environment, all ranks get parts of the same size: the
        same number of micro-batches, in step with each other.
        """
        t, n = minibatch // (num_envs * self.size), minibatch % (num_envs * self.size) - self.rank * num_envs
        mine = (n >= 0) & (n < num_envs)
        return t[mine] * num_envs + n[mine]

    def rows_in_step(self, rows, needed):
        """`rows` (index array) to compute on. Where a forward pass needs all ranks (`needed`: the model is sharded) and another
        rank has some, one that has none computes on row 0, whose result nobody uses."""
        if needed and self.any(len(rows)) and not len(rows):
            return np.array([0])
        return rows

    def sum_(self, tensor):
        """Sum `tensor` over the ranks, in place, and return it."""
        if self.size > 1:
            import torch.distributed as dist

            with self._in_contact():
                dist.all_reduce(tensor)
        return tensor

    def sum_gradients_(self, parameters):
        """Sum the gradients of `parameters` over the ranks, in place.

        One all-reduce of one flat vector after the last micro-batch. DistributedDataParallel would hide it behind the
        backward pass, but hooks every parameter to do so, wraps the model, and counts on one backward pass of one loss.
        Adapters and value head are small (220 M numbers at 7B): 0.9 GB take 5 ms where 300 GB/s connect the GPUs.
        """
        if self.size > 1:
            import torch

            gradients = [p.grad for p in parameters if p.grad is not None]  # the same ones on every rank
            if not gradients:  # nobody learns here: no critic, and no step of the policy
                return
            flat = self.sum_(torch.cat([g.flatten() for g in gradients]))
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def broadcast_(self, parameters):
        """Overwrite `parameters` with rank 0's: equal seeds draw equal numbers only on equal machines."""
        if self.size > 1:
            import torch.distributed as dist

            with self._in_contact():
                for p in parameters:
                    dist.broadcast(p.data, 0)

    def gather(self, obj, everywhere=True):
        """[the `obj` of rank 0, of rank 1, ...], on every rank or (everywhere=False) on rank 0 and None elsewhere.

        Pickled, over the CPU: for things of at most some megabytes.
        """
        if self.size == 1:
            return [obj]
        import torch.distributed as dist

        objects = [None] * self.size if everywhere or self.is_main_process else None
        with self._in_contact():
            if everywhere:
                dist.all_gather_object(objects, obj)
            else:
                dist.gather_object(obj, objects, 0)
        return objects

    def any(self, flag):
        """Is `flag` true on any rank?"""
        import torch

        return bool(self.sum_(torch.tensor(float(flag))))

    def barrier(self):
        self.gather(None)

    # ---- ranks that end ----------------------------------------------------------------------------------------------

    def _beat(self):
        self._store.set(f"beat{self.rank}", str(time.time_ns()))

    def _beats(self):
        return self._store.multi_get([f"beat{r}" for r in range(self.size)])

    def _ended(self):
        """(rank, reason) of the first one that ended and could say so; the reason is empty after a signal."""
        if not self._store.check(["ended"]):
            return None
        rank, _, reason = self._store.get("ended").decode().partition(" ")
        return int(rank), reason

    def _silent(self, patience):
        """Ranks that give no sign of life for `patience` seconds from now, and did not say that they leave."""
        silent, before, until = (
            set(range(self.size)) - {self.rank},
            self._beats(),
            time.monotonic() + patience,
        )
        while silent and time.monotonic() < until:
            time.sleep(0.2)
            beats = self._beats()
            silent = {r for r in silent if beats[r] == before[r] and not self._store.check([f"left{r}"])}
        return sorted(silent)

    def _watch(self):
        """Thread: beat, watch, and end this process where the main thread cannot (it may be inside NCCL for ever)."""
        last, unchanged = None, [0] * self.size
        try:
            while not self._stopped.wait(BEAT):
                self._beat()
                beats = self._beats()
                for r in range(self.size):
                    unchanged[r] = unchanged[r] + 1 if last and beats[r] == last[r] else 0
                last = beats
                ended = self._ended()
                lost = [r for r in range(self.size) if unchanged[r] >= SILENCE]
                if ended or lost:
                    text = _obituary(*ended) if ended else _gone(lost)
                    self._stopped.wait(GRACE_STOP if ended and not ended[1] else GRACE)
                    return self._end(text)
        except RuntimeError as exc:
            if not self._stopped.wait(GRACE):
                self._end(f"torchrun's store, on the machine of rank 0, does not answer ({_first_line(exc)})")

    def _end(self, text):
        if not (self._stopped.is_set() or self._ending):
            print(f"error: rank {self.rank} of {self.size}: {text}", file=sys.stderr, flush=True)
            os._exit(1)  # simulator processes leave by themselves when their parent is gone

    @contextlib.contextmanager
    def _in_contact(self):
        try:
            yield
        except RuntimeError as exc:  # gloo's and NCCL's errors are of this kind
            raise self._explanation() or UserError(f"the ranks lost contact: {_first_line(exc)}") from exc

    def check_others(self):
        """Raise UserError if another rank died. torchrun then sends SIGTERM to all the rest, which looks like Ctrl-C."""
        if self.size > 1 and isinstance(problem := self._explanation(), UserError):
            raise problem

    def _explanation(self):
        """The exception that says why a collective failed, if it was because another rank ended; else None."""
        if self._thread is None:
            return None
        with contextlib.suppress(RuntimeError):
            lost = self._silent(5 * BEAT)
            if ended := self._ended():
                return UserError(_obituary(*ended)) if ended[1] else KeyboardInterrupt()
            if lost:
                return UserError(_gone(lost))
        return None

    def leave(self, reason=None):
        """The end of this rank: None when all is done, else why, empty after a signal."""
        if self._thread is None:  # alone, or the ranks never met
            return
        import torch.distributed as dist

        if reason is None:
            self.barrier()  # nobody may find the others gone who still needs them
        self._ending = True
        with contextlib.suppress(RuntimeError):  # the store may be what has died
            if reason is not None:
                self._store.compare_set("ended", "", f"{self.rank} {reason}")
            self._store.set(f"left{self.rank}", "")
        self._stopped.set()
        self._thread.join(2 * BEAT)
        if reason is None:
            dist.destroy_process_group()


def _first_line(exc):
    return str(exc).strip().split("\n")[0][:200]


def _gone(ranks):
    names = f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"
    return f"{names} gone without a word (killed, out of memory, or the machine is down); the job ends, what is saved stays"


def _obituary(rank, reason):
    return f"rank {rank} ended ({reason or 'stopped by a signal'}); so does the job, what is saved stays"


ALONE = Ranks()  # a plain process: what functions take where nobody gives them ranks
_ranks = None


def join():
    """Meet the other ranks, if torchrun started any. Returns this process's `Ranks`. Call once."""
    global _ranks
    import torch

    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if 0 < gpus < local_size:
        raise UserError(
            f"torchrun started {local_size} processes here, but torch sees {gpus} GPUs: --nproc-per-node {gpus}"
        )
    device = "cpu" if not gpus else "cuda" if size == 1 else f"cuda:{local_rank}"
    _ranks = Ranks(rank, size, local_rank, local_size, device)
    if size > 1:
        if gpus:
            torch.cuda.set_device(local_rank)
        _ranks._meet("cpu:gloo,cuda:nccl" if gpus else "gloo")
    return _ranks


def ends_together(main):
    """Decorator for a script's `main()` that calls `join`: however this rank ends, the others learn it and say so."""

    @functools.wraps(main)
    def guarded(*args):
        try:
            main(*args)
            if _ranks:
                _ranks.leave()
        except BaseException as exc:
            if _ranks is None or _ranks.size == 1:
                raise
            # A collective inside a sharded layer, or torchrun's SIGTERM.
            if isinstance(exc, (RuntimeError, KeyboardInterrupt)):
                exc = _ranks._explanation() or exc
            stopped = isinstance(exc, KeyboardInterrupt) or isinstance(exc, SystemExit) and exc.code == 130
            reason = (
                " ".join(str(exc).split())
                if isinstance(exc, UserError)
                else f"{type(exc).__name__}: {_first_line(exc)}"
            )
            _ranks.leave("" if stopped else reason)
            if isinstance(exc, UserError):
                raise UserError(f"rank {_ranks.rank} of {_ranks.size}: {exc}") from exc
            raise exc

    return guarded


def restarted_after(path):
    """Did `torchrun --max-restarts` start this process again, and did the same job write `path`?

    Only then may a run directory that exists be continued without being asked: the file has to be younger than torchrun,
    which is this process' parent.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0 or not path.exists():
        return False
    import psutil

    return path.stat().st_mtime > psutil.Process(os.getppid()).create_time()
