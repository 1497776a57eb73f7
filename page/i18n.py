"""The page's own texts, in the visitor's language: Chinese first, English second."""

import gradio as gr

from chat.persona import NAME, PASSER_BY, SCENES

# key → Chinese, English
TEXTS = {
    "send": ("送出", "Send"),
    "stop": ("停下", "Stop"),
    "invitation": ("对她说些什么……", "Say something to her…"),
    "talk": ("相谈", "Talk"),
    "compare": ("并排", "Side by side"),
    "scene": ("她身在何时何处", "When and where she is"),
    "visitor": ("你是谁", "Who you are to her"),
    "voice": ("声音与文采", "Voice and sampling"),
    "adapter": ("声音（适配器）", "Voice (adapter)"),
    "temperature": ("温度", "Temperature"),
    "top_p": ("核采样 top-p", "Top-p"),
    "top_k": ("候选数 top-k", "Top-k"),
    "repetition_penalty": ("重复惩罚", "Repetition penalty"),
    "max_new_tokens": ("最长回话（token）", "Longest reply (tokens)"),
    "seed": ("种子（-1 为随机）", "Seed (-1: a new one each time)"),
    "earlier": ("◀ 上一种", "◀ Earlier"),
    "later": ("下一种 ▶", "Later ▶"),
    "go_on": ("接着说", "Continue"),
    "suggest": ("替我说", "Suggest my line"),
    "revise": ("改她的话", "Edit her reply"),
    "revised": ("她的话，由你改写", "Her reply, in your words"),
    "save": ("改好了", "Save"),
    "cancel": ("不改了", "Cancel"),
    "keep": ("留存与取回", "Keep and bring back"),
    "export_markdown": ("存为 Markdown", "Save as Markdown"),
    "export_json": ("存为 JSON", "Save as JSON"),
    "export_sharegpt": ("存为 ShareGPT", "Save as ShareGPT"),
    "import": ("取回一段", "Open a saved one"),
    "forget": ("全部抹去", "Delete everything"),
    "private": (
        "谈话只存在你的浏览器里；服务器不留一字。",
        "Your talks are kept in your browser alone; the server stores none.",
    ),
    "question": ("同一问，两人答", "One question, two replies"),
    "ask": ("问", "Ask"),
    "left": ("左边更像她", "Left is more like her"),
    "right": ("右边更像她", "Right is more like her"),
    "even": ("难分高下", "Hard to say"),
    "blind": (
        "一边戴着适配器，一边只是底座；投票之后才揭晓。",
        "One side uses the adapter, the other is the base alone; your vote reveals which.",
    ),
}
# What an adapter's folder does not tell, for the note below a reply.
UNSTATED = {
    "prompt": "训练时的提示词 Training prompt: 未注明，当作与此处相同 not stated, taken to be this one",
    "base": "训练时的底座 Trained on: 名字不认得，按尺寸判定 not known by name, told by its dimensions",
}
GRADIO = {  # strings that Gradio leaves in English
    "chat_interface.new_chat": ("新的一段", "New chat"),
    "chat_interface.message_placeholder": ("说些什么……", "Type a message…"),
    "chat_interface.chatbot": ("谈话", "Chat"),
    "chat_interface.conversation": ("谈话", "Conversation"),
    "chatbot.copy_message": ("抄下这句", "Copy message"),
    "chatbot.copied_message": ("已抄下", "Copied message"),
}
VISITORS = {
    PASSER_BY: "A passer-by", "皇上": "The Emperor", "皇后": "The Empress", "果郡王": "Prince Guo",
    "沈眉庄": "Shen Meizhuang", "安陵容": "An Lingrong", "华妃": "Consort Hua", "敬妃": "Consort Jing",
    "槿汐": "Jinxi, her aide", "浣碧": "Huanbi, her maid", "温实初": "Doctor Wen", "弘历": "Hongli, her son",
}  # fmt: skip
SCENE_LINE = "setting "  # opens the key of the line that tells who she is in a scene
_ALL = (
    TEXTS
    | GRADIO
    | {name: (name, f"{english} · {name}") for name, english in VISITORS.items()}
    | {scene.name: (scene.name, f"{scene.english} · {scene.name}") for scene in SCENES}
    | {
        SCENE_LINE + scene.name: (
            f"{NAME}，{scene.rank}，{scene.age} 岁",
            f"{NAME}, {scene.rank_english}, {scene.age} years old",
        )
        for scene in SCENES
    }
)
_CHINESE, _ENGLISH = ({key: pair[language] for key, pair in _ALL.items()} for language in (0, 1))
LANGUAGES = gr.I18n(**{"zh-CN": _CHINESE, "zh-TW": _CHINESE, "en": _ENGLISH})


def text(key: str) -> str:
    """The text for `key`, which the browser puts into its language. Raises KeyError for a key that is not here."""
    return str(LANGUAGES(key)) if _ALL[key] else ""
