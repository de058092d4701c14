"""LlamaIndex with the guarded model and filter, its model made up; reads JSON, prints JSON."""

import asyncio
import json
import sys

from llama_index.core.llms import LLM, ChatMessage, MockLLM
from llama_index.core.schema import NodeWithScore, TextNode

from latentguard.integrations.llama_index import GuardedLLM, GuardedNodes

asked = json.load(sys.stdin)
harmless, harmful = asked["harmless"], asked["harmful"]
llm = GuardedLLM(MockLLM(), url=asked["url"])  # it says what it is asked
assert isinstance(llm, LLM)


def user(text):
    return [ChatMessage(role="user", content=text)]


def chat(text):
    return llm.chat(user(text)).message.content


async def asynchronous():
    pieces = [one async for one in await llm.astream_chat(user(harmful))]
    return dict(
        achat=(await llm.achat(user(harmful))).message.content,
        acomplete=(await llm.acomplete(harmful)).text,
        astream_chat=pieces[-1].message.content,
        fine=(await llm.acomplete(harmless)).text,
    )


def failing(work):
    try:
        work()
    except Exception as raised:
        return str(raised)
    return None


nodes = [NodeWithScore(node=TextNode(text=text)) for text in (harmless, harmful, " ")]
kept = GuardedNodes(url=asked["url"]).postprocess_nodes(nodes)
image = [ChatMessage(role="user", blocks=[dict(block_type="image", url="http://x/y.png")])]
told = dict(
    harmless=harmless in chat(harmless),
    harmful=chat(harmful),
    complete=llm.complete(harmful).text,
    stream=[one.text for one in llm.stream_complete(harmful)],
    stream_chat=[one.message.content for one in llm.stream_chat(user(harmful))],
    asynchronous=asyncio.run(asynchronous()),
    nodes=[node.get_content() for node in kept],
    image=failing(lambda: llm.chat(image)),
    away=failing(lambda: GuardedLLM(MockLLM(), url="http://127.0.0.1:9").complete(harmless)),
)
json.dump(told, sys.stdout)
