"""Machine: random steps and aborts under a scheduler, for tests that add the rest."""

from fake_model import FakeModel
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from torch_pd.engine.sequence import Sequence, Status


class Machine(RuleBasedStateMachine):
    """Steps and aborts under a scheduler; what starts it and adds to ``seqs`` is for its heirs."""

    model: FakeModel
    seqs: list[Sequence]

    @property
    def scheduler(self):
        return self.model.scheduler

    @rule(n=st.integers(1, 4))
    def step(self, n):
        for _ in range(n):
            self.model.step()

    @precondition(lambda self: self.seqs)
    @rule(data=st.data(), in_flight=st.booleans())
    def abort(self, data, in_flight):
        plan = None
        if in_flight:
            self.model.settle()
            plan = self.model.schedule()
            tokens = self.model.run(plan)
        seq = data.draw(st.sampled_from(self.seqs + self.model.children))
        live = seq.status in (Status.WAITING, Status.RUNNING, Status.ARRIVING)
        assert self.scheduler.abort(seq.seq_id) is (seq if live else None)
        if live:
            seq.data = (seq.data[0], seq.num_output, 0)
        if plan is not None:
            self.model.finish_step(plan, tokens)

    def end(self, factor, more):
        """Every sequence ends in time and has its tokens. The oldest is never preempted and served
        at least every max_num_seqs steps; such rounds are allowed ``factor`` times, and ``more``
        steps."""
        everyone = self.seqs + [c for s in self.seqs for c in [s] * s.data[2]]
        work = sum(s.num_prompt + s.data[1] for s in everyone + self.model.children)
        rounds = factor * (work + len(everyone))
        self.model.drain(limit=rounds * self.scheduler.max_num_seqs + more)
        for seq in self.seqs + self.model.children:
            assert seq.status in (Status.FINISHED, Status.FAILED)
            self.model.verify(seq)
