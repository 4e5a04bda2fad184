"""When a request stops, and a list helper (vLLM: `v1/core/sched/utils.py`)."""

from __future__ import annotations

from folovllm.request import Request, RequestStatus


def check_stop(request: Request, max_model_len: int, last_token_id: int | None = None) -> bool:
    """Return whether the token appended last ends the request; if so, set its status (and stop_reason).

    In this order, so that an end-of-sequence token on the last allowed position counts as a stop, not as a
    cut:

    1. fewer outputs than min_tokens: goes on
    2. the end-of-sequence token: FINISHED_STOPPED
    3. one of stop_token_ids: FINISHED_STOPPED, and `stop_reason` is the token
    4. max_model_len or max_tokens reached: FINISHED_LENGTH_CAPPED

    `last_token_id` is that token, where the caller has it at hand anyway: to read it from the request costs as much as
    the four tests. Stop strings are the OutputProcessor's: the core knows no text.
    """
    params = request.sampling_params
    num_tokens = request.num_tokens
    num_output_tokens = num_tokens - request.num_prompt_tokens
    if num_output_tokens < params.min_tokens:
        return False
    if last_token_id is None:
        last_token_id = request.output_token_ids[-1]
    if last_token_id == params.eos_token_id:
        request.status = RequestStatus.FINISHED_STOPPED
        return True
    if params.stop_token_ids and last_token_id in params.stop_token_ids:
        request.status = RequestStatus.FINISHED_STOPPED
        request.stop_reason = last_token_id
        return True
    max_tokens = request.max_tokens
    if (max_tokens is not None and num_output_tokens >= max_tokens) or num_tokens >= max_model_len:
        request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        return True
    return False


def remove_all(requests: list[Request], to_remove: set[Request]) -> list[Request]:
    """Return `requests` without those in `to_remove`, order kept; in place where it is only one."""
    if len(to_remove) == 1:
        (request,) = to_remove
        if request in requests:
            requests.remove(request)
        return requests
    return [request for request in requests if request not in to_remove]
