"""Every error and warning of the library.

    GradAccumError
    ├── LossError (ValueError)           a loss that cannot be accumulated: not a scalar, no graph, totals unknown
    │   │                                [losses/terms.py, losses/loss.py, losses/normaliser.py]
    │   └── MeanError                    a mean over something else than it is taken for
    │                                    [losses/wrong_means.py, losses/meaning.py]
    ├── UnknownLossError (TypeError)     a loss whose mean nothing is known about, or that is not reduced at all
    │                                    [losses/criterion.py]
    ├── BatchError (ValueError)          a batch that cannot be cut: rows disagree, no rows, no tensors
    │                                    [tree/disagreement.py, split/reading.py, whole_batch/outputs.py]
    ├── WindowError (ValueError)         sizes that make no window: below 1, larger than an epoch, not adding up
    │                                    [window/window_size.py, window/options.py, whole_batch/runners.py]
    ├── ParameterError (ValueError)      optimizer and model do not fit, or there is nothing to train
    │                                    [window/parameters.py, window/options.py]
    │   └── OptionError (TypeError)      an option that there is not, or of another type than it has
    │                                    [window/option_names.py, window/options.py]
    ├── MisuseError (RuntimeError)       something was called by hand that would break the window
    │                                    [window/guards.py, gradients/gradient_sum.py, window/looking_ahead.py]
    ├── ReplayError (RuntimeError)       a forward that was run twice gave something else the second time
    │                                    [whole_batch/forward_replay.py]
    ├── DoesNotFitError (MemoryError)    one sample alone runs out of memory [fit/transaction.py]
    ├── RankError (RuntimeError)         another process failed, or has gone [sync/ranks.py, sync/messages.py]
    ├── StateError (ValueError)          a state that cannot be saved or loaded
    │                                    [checkpoint/checkpoint.py, window/run_counts.py]
    ├── InexactError (AssertionError)    an audit found that accumulation is not the whole batch
    │                                    [auditing/audit_report.py]
    ├── UnsupportedError (NotImplementedError)   a combination that would not be exact, refused
    │                                    [sync/detect.py, window/parameters.py, chunks/row_chunks.py]
    └── MissingExtraError (ImportError)  an optional dependency is needed for what was asked [report/__init__.py]

    GradAccumWarning (UserWarning)
    ├── BatchNormWarning                 normalisation statistics are the micro-batch's, not the batch's
    │                                    [window/plan_line.py]
    └── DiscardedWindowWarning           gradients were thrown away with a window that never closed [window/guards.py]

In brackets: the files where most of a class's texts stand, each where it is raised.
A message says three things: what happened, with the numbers; what it would do to the gradient; what to type instead.
"""


class GradAccumError(Exception):
    """Base of every error this library raises."""


class LossError(GradAccumError, ValueError):
    """A loss that cannot be accumulated as it is.

    Remedy: Return a 0-d tensor with a graph, or a `ga.Loss`: of Hugging Face's models ``output.loss``, before
    ``.item()`` and ``.detach()``. Several terms are a dict, and those over different things need ``weights=``.
    """


class MeanError(LossError):
    """A mean that was not taken over samples, or not over what was declared: its weight is another.

    Remedy: ``criterion = ga.criterion(nn.CrossEntropyLoss(...))`` finds the count by itself; ``ga.Loss.mean(loss,
    over=n)`` declares it, ``ga.Loss.sum(loss)`` keeps a sum. `ga.audit` tries such lines and prints the one that is
    exact.
    """


class UnknownLossError(GradAccumError, TypeError):
    """A loss of which it is unknown what its mean is taken over.

    Remedy: Return ``ga.Loss.mean(value, over=n)`` or ``ga.Loss.sum(value, over=n)`` from a function of your own;
    give a loss of `torch.nn` the reduction "mean" or "sum", and an instance in place of the class.
    """


class BatchError(GradAccumError, ValueError):
    """A batch that cannot be cut into micro-batches.

    Remedy: ``axes=`` of ``ga.split_by_samples`` says where the samples of an entry lie, or that it has none;
    ``samples=`` of `Accumulator` counts those of a micro-batch.
    """


class WindowError(GradAccumError, ValueError):
    """Sizes from which no window of micro-batches can be made.

    Remedy: ``batch_size=`` is a number of samples and a multiple of the loader's; ``micro_batches=`` is a number of
    the loader's items. For an epoch shorter than a window: ``tail="step"``.
    """


class ParameterError(GradAccumError, ValueError):
    """Optimizer and model do not belong together, or nothing is trainable.

    Remedy: Pass ``model, optimizer`` in this order, with the optimizer made of this model's parameters, after it
    was built and moved. An option has one of the values that the message lists.
    """


class OptionError(ParameterError, TypeError):
    """An option that there is not, an argument too many, or a value of another type than the option has.

    Remedy: The message names the option that was probably meant, or the type. ``model, optimizer`` (and ``loss_fn``) go
    by place, everything else by name.
    """


class MisuseError(GradAccumError, RuntimeError):
    """A call by hand that would change the gradient of an open window.

    Remedy: Leave ``optimizer.step()``, ``zero_grad()``, ``loss.backward()`` and the schedule of an update to the
    library. What is to be done to the final gradient goes into ``before_step=``.
    """


class ReplayError(GradAccumError, RuntimeError):
    """A forward that had to be run twice gave other outputs the second time.

    Remedy: The forward depends on something besides its input, buffers and the random state of torch, numpy and
    Python, which were put back: a counter of its own, autocast that changes. Take that out of it.
    """


class DoesNotFitError(GradAccumError, MemoryError):
    """One sample alone runs out of memory, so no micro-batch size can help.

    Remedy: Type the line that the message names: ``activations="recompute"``, `ga.chunked_head`. Where it names none,
    FSDP2 or shorter samples: a sample cannot be cut. `ga.plan` says what takes the memory.
    """


class RankError(GradAccumError, RuntimeError):
    """Another process of the training failed, or has gone.

    Remedy: Read the message of the process that it names; this one only stopped with it.
    """


class StateError(GradAccumError, ValueError):
    """A state that cannot be saved now, or does not fit what it is loaded into.

    Remedy: Save between updates, and load into what was built alike. What cannot be saved is named by its key.
    """


class InexactError(GradAccumError, AssertionError):
    """An audit found that the accumulated update is not the whole batch's.

    Remedy: Read the report: each culprit has the line to type.
    """


class UnsupportedError(GradAccumError, NotImplementedError):
    """A combination that would not be exact, and is refused instead of approximated.

    Remedy: The message names what to use instead; there is no option that forces it.
    """


class MissingExtraError(GradAccumError, ImportError):
    """An optional dependency is needed for what was asked.

    Remedy: Install the extra that the message names, or leave out the option that needs it.
    """


class GradAccumWarning(UserWarning):
    """Base of every warning this library gives."""


class BatchNormWarning(GradAccumWarning):
    """BatchNorm normalises with the statistics of the micro-batch.

    Remedy: ``TrainStep(batch_norm="exact")``; when fine-tuning ``batch_norm="frozen"``; in a new model
    ``nn.GroupNorm``.
    """


class DiscardedWindowWarning(GradAccumWarning):
    """Accumulated gradients were thrown away because their window never closed.

    Remedy: Leave the loop right after an update; or ``tail="step"``, which applies an incomplete last window. Where
    an exception of your own ended the loop, the warning needs no answer.
    """
