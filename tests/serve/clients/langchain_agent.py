"""A LangChain agent with the middleware, its model made up; reads JSON, prints JSON."""

import asyncio
import json
import sys

from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.tools import tool

from latentguard.integrations.langchain import LatentGuardMiddleware

asked = json.load(sys.stdin)


@tool
def search(query: str) -> str:
    """Look something up."""
    return asked["result"]


class Model(GenericFakeChatModel):
    """Says what it is told to, and counts how often it is asked."""

    def bind_tools(self, tools, **_):
        """It knows them."""
        return self


def agent(url, *messages):
    model = Model(messages=iter(messages))
    return create_agent(model, [search], middleware=[LatentGuardMiddleware(url)])


def said(state):
    return state["messages"][-1].content


def user(text):
    return {"messages": [{"role": "user", "content": text}]}


CALL = AIMessage("", tool_calls=[dict(name="search", args={"query": "x"}, id="c1")])
url = asked["url"]
harmless, harmful = asked["harmless"], asked["harmful"]
refused = agent(url, AIMessage("never")).invoke(user(harmful))
try:
    agent("http://127.0.0.1:9", AIMessage("never")).invoke(user(harmless))
    error = None
except Exception as raised:
    error = str(raised)
told = dict(
    harmless=said(agent(url, AIMessage("fine")).invoke(user(harmless))),
    harmful=said(refused),
    note=refused["messages"][-1].response_metadata["latentguard"]["flagged"],
    later=said(asyncio.run(agent(url, AIMessage("never")).ainvoke(user(harmful)))),
    fine_later=said(asyncio.run(agent(url, AIMessage("fine")).ainvoke(user(harmless)))),
    tool=said(agent(url, CALL, AIMessage("never")).invoke(user(harmless))),
    error=error,
)
json.dump(told, sys.stdout)
