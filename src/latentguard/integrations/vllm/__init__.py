"""The guard inside vLLM: the verdict comes out of the engine's own prefill.

* ``model``: the engine's model class, which also writes each token's partial scores into a buffer
  indexed by KV slot, so that a prefix-cache hit keeps its scores;
* ``connector``: a KV connector that transfers nothing: it clears the slots of new blocks, and reads
  those of a prompt's positions once the prompt was computed;
* ``score_channel``: brings what was read to whoever asked, before the engine hands out the first
  token, and then the score of each token of a reply, if the guard judges replies;
* ``middleware``: asks for each chat of the OpenAI server, and holds the reply until the verdict;
* ``judged_reply``: lets a reply through as its tokens are read;
* ``backend``: the same for a program, so that a guard is calibrated on the engine's own scores.

``python -m latentguard.integrations.vllm GUARD`` starts the server.
``docs/how-to/vllm.md`` is the guide.
"""
