"""The page's own texts, in the visitor's language: Chinese first, English second."""

import json
from collections.abc import Mapping
from dataclasses import asdict

import gradio as gr

from chat.engine import MAX_CHARACTERS, MAX_TURNS
from chat.persona import NAME, PASSER_BY, PERSONA_LIMITS, SCENES, SYSTEM_PROMPT

# key → Chinese, English: texts of Gradio's parts
TEXTS = {
    "send": ("送出", "Send"),
    "stop": ("停下", "Stop"),
    "invitation": ("对她说些什么……", "Say something to her…"),
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
    "question": ("同一问，两人答", "One question, two replies"),
    "ask": ("问", "Ask"),
    "left": ("左边更像她", "Left is more like her"),
    "right": ("右边更像她", "Right is more like her"),
    "even": ("难分高下", "Hard to say"),
    "blind": (
        "一边用适配器，一边只是底座；投票之后才揭晓。",
        "One side uses the adapter, the other is the base alone; your vote reveals which.",
    ),
    "left_side": ("左", "Left"),
    "right_side": ("右", "Right"),
    "nothing_yet": ("问过之后，回话写在这里。", "A reply will stand here once you have asked."),
}
# The same for what page/static draws; {} is filled in there.
BROWSER = {key: TEXTS[key] for key in ("compare", "voice", "visitor")} | {
    "no_adapter": ("声音 {} 已不在这里，换了一个。", "The adapter {} is no longer here; another one speaks."),
    "name": (NAME, NAME),
    "you": ("你", "You"),
    "made": ("她的话由模型写成，并非真人。", "A model writes her words; she is no real person."),
    "private": (
        "谈话只存在你的浏览器里；服务器不留一字。",
        "Your talks are kept in your browser alone; the server stores none.",
    ),
    "age": ("{} 岁", "{} years old"),
    "talk": ("相谈", "Talk"),
    "talks": ("旧谈", "Talks"),
    "new_talk": ("新的一段", "New talk"),
    "search": ("寻一句话", "Search"),
    "no_talks": ("还没有旧谈。说上一句，就记在这里。", "No talks yet. Say something, and it is kept here."),
    "none_found": ("没有找到。", "Nothing found."),
    "rename": ("改名", "Rename"),
    "delete": ("删去", "Delete"),
    "deleted": ("已删去。", "Deleted."),
    "undo": ("撤销", "Undo"),
    "trash": ("已删去的", "Deleted talks"),
    "restore": ("取回", "Restore"),
    "erase": ("永远删去", "Delete for good"),
    "branch_of": ("分支", "branch"),
    "moments": ("珍藏", "Moments"),
    "no_moments": ("还没有珍藏。在她的话下面点「珍藏」。", "None yet. Choose Keep below a line of hers."),
    "menu": ("更多", "More"),
    "close": ("合上", "Close"),
    "scenes": ("何时何处，何人来访", "When, where, and who comes"),
    "enter": ("去见她", "Go to her"),
    "print": ("打印这段谈话", "Print this talk"),
    "export_md": ("存为 Markdown", "Save as Markdown"),
    "export_json": ("存为 JSON", "Save as JSON"),
    "export_sharegpt": ("存为 ShareGPT", "Save as ShareGPT"),
    "export_messages": ("存为 messages", "Save as messages"),
    "import": ("取回一段", "Open a saved one"),
    "forget": ("全部抹去", "Delete everything"),
    "forgotten": ("已全部抹去。", "Everything was deleted."),
    "unreadable": (
        "读不懂：请选本页存出的 JSON 或 ShareGPT。",
        "Not a transcript of this page; its JSON or ShareGPT can be read.",
    ),
    "too_long": ("这份记录太长，至多 {} 字。", "The transcript is too long; {} characters fit."),
    "writing": ("她正提笔……", "She is at her brush…"),
    "thinking": ("容她想想……", "She is thinking…"),
    "suggest": ("替我说", "Suggest my line"),
    "suggesting": ("正替你想一句……", "Looking for words for you…"),
    "again": ("重试", "Retry"),
    "earlier": ("上一种", "Earlier"),
    "later": ("下一种", "Later"),
    "edit": ("改", "Edit"),
    "save": ("改好了", "Save"),
    "ask_again": ("再问", "Ask"),
    "cancel": ("不改了", "Cancel"),
    "revised": ("她的话，由你改写", "Her reply, in your words"),
    "asked": ("你的话", "Your words"),
    "edited": ("由你改写", "in your words"),
    "go_on": ("接着说", "Continue"),
    "copy": ("抄下", "Copy"),
    "copied": ("已抄下。", "Copied."),
    "more": ("更多", "More"),
    "branch": ("由此另起一段", "Branch from here"),
    "pin": ("珍藏", "Keep"),
    "unpin": ("不再珍藏", "No longer keep"),
    "provenance": ("来历", "Provenance"),
    "same_again": ("抄下同样一问的链接", "Copy a link that asks the same"),
    "facts_adapter": ("声音", "Adapter"),
    "facts_base": ("底座", "Base"),
    "facts_prompt": ("提示词", "Prompt"),
    "unstated_prompt": ("训练时的未注明，当作与此处相同", "not stated by the adapter; taken to be this one"),
    "unstated_base": ("（训练时的名字不认得，按尺寸判定）", " (told by the adapter's dimensions, not by name)"),
    "facts_seed": ("种子", "Seed"),
    "facts_speed": ("{} 个 token，首字 {} 秒，每秒 {} 个", "{} tokens, the first after {} s, {} a second"),
    "facts_took": ("用时", "Took"),
    "facts_stop": ("收尾", "End"),
    "stop_stop": ("自己说完", "ended by herself"),
    "stop_length": ("到长度上限", "length limit"),
    "stop_time": ("超时", "time limit"),
    "stop_cancelled": ("被打断", "stopped"),
    "broken": ("这句没有说完。", "This reply was cut off."),
    "open": ("这句还没有回话。", "There is no reply yet."),
    "offline": (
        "线断了。话已放回，接通后再问。",
        "You are offline. Your words are back in the box; they go out when the line is back.",
    ),
    "offline_half": (
        "线断了。说了一半的话留着，接通后再问。",
        "You are offline. The half reply is kept; she is asked again when the line is back.",
    ),
    "unreachable": (
        "没有连上她那里。话已放回，请再试。",
        "She could not be reached. Your words are back in the box; try again.",
    ),
    "busy": ("她还在说话，待她说完。", "She is still speaking; wait until she has ended."),
    "bad_link": (
        "这个链接里有本页没有的东西，没有照办。",
        "This link names something that this page does not have; it was left aside.",
    ),
    "not_kept": (
        "浏览器不让存：谈话只留到这一页关上。",
        "The browser refuses storage: talks last until this page is closed.",
    ),
    "tally": ("至今：适配器 {} 票，底座 {} 票，难分 {} 票", "So far: adapter {}, base {}, even {}"),
    "persona": ("你自己是谁（可不填）", "Who you are yourself (optional)"),
    "persona_name": ("名字", "Your name"),
    "persona_line": ("说说自己，一句就好", "A line about yourself"),
    "speak": ("念出来", "Read aloud"),
    "aloud": ("自动念她的话", "Read her replies aloud"),
    "card": ("做成一张画笺", "Make a picture card"),
    "card_save": ("存下", "Save"),
    "card_share": ("送人", "Share"),
    "seal": ("甄嬛", "甄嬛"),
    "today": ("今天", "Today"),
    "yesterday": ("昨天", "Yesterday"),
}
# Her greeting and the openers of each scene, for visitors who read English.
ENGLISH = {
    "永寿宫": (
        "The weather is fine today, and I have made tea here in Yongshou Palace. You have come a long way: "
        "sit down, and tell me slowly.",
        ("Who are you?", "The Emperor is here!", "How did you and Meizhuang meet?",
         "My heart is broken. Any advice?", "What sweets would you like tonight?",
         "Tell me again of the snow in the plum garden."),
    ),
    "初入宫": (
        "The crab-apple at Suiyu Pavilion is half in bloom; I was counting today's new flowers. The sisters say days "
        "are long in the palace. You come at the right time: sit with me.",
        ("Are you used to the palace yet?", "Why do you say that you are ill?", "How quiet it is here.",
         "Do you miss home?"),
    ),
    "盛宠": (
        "I had played half a tune when a string went slack. Everyone says that I am in favour; what lies beneath that "
        "word, I alone know. Say what you like.",
        ("Will the Emperor come today?", "Has Consort Hua troubled you again?",
         "Do you fear the day you lose his favour?", "Would you play for me?"),
    ),
    "甘露寺": (
        "The hills are quiet; one hears only the wind in the pines. My name in the order is Mochou. I have no good "
        "tea to offer, but the spring water is clean. Sit down.",
        ("Is life hard up here?", "Do you still think of Longyue?", "Who plays the flute at night?",
         "What will you do from now on?"),
    ),
    "回宫": (
        "After these years the palace walls have their old colour, and those within have other hearts. Are you here "
        "to greet my return, or to laugh at me?",
        ("You have changed in these years.", "Does Longyue still know you?", "Why did you come back?",
         "My lady, I wish you joy of the child."),
    ),
    "封后斗争": (
        "The lamp in Jingren Palace burned all night again. She cannot sleep, and nor can I. Since you are here, "
        "close the door and speak softly.",
        ("Must it be settled between you and the Empress?", "Were you afraid on the day of the blood test?",
         "Why does Qi hate you so?", "Whom do you trust?"),
    ),
    "太后": (
        "My Shoukang Palace is quiet even by day. The children have their own ways to go; how good of you to come and "
        "talk of old times with me.",
        ("Are you content as Dowager?", "If you could choose again, would you enter the palace?",
         "Whom do you meet in dreams?", "A word for the young Emperor?"),
    ),
}  # fmt: skip
VISITORS = {
    PASSER_BY: "A passer-by", "皇上": "The Emperor", "皇后": "The Empress", "果郡王": "Prince Guo",
    "沈眉庄": "Shen Meizhuang", "安陵容": "An Lingrong", "华妃": "Consort Hua", "敬妃": "Consort Jing",
    "槿汐": "Jinxi, her aide", "浣碧": "Huanbi, her maid", "温实初": "Doctor Wen", "弘历": "Hongli, her son",
}  # fmt: skip
_CHINESE, _ENGLISH = ({key: pair[language] for key, pair in TEXTS.items()} for language in (0, 1))
LANGUAGES = gr.I18n(**{"zh-CN": _CHINESE, "zh-TW": _CHINESE, "en": _ENGLISH})


def text(key: str) -> str:
    """The text for `key`, which the browser puts into its language. Raises KeyError for a key that is not here."""
    return str(LANGUAGES(key)) if TEXTS[key] else ""


def browser_module(numbers: Mapping[str, tuple[float, float]]) -> str:
    """The module that page/static/data.js reads: texts, scenes, visitors, and the range of each of `numbers`."""
    scenes = []
    for scene in SCENES:
        greeting, openers = ENGLISH[scene.name]
        scenes.append(asdict(scene) | {"greeting_english": greeting, "openers_english": openers})
    limits = {"characters": MAX_CHARACTERS, "turns": MAX_TURNS, "numbers": numbers, "persona": PERSONA_LIMITS}
    data = {"texts": BROWSER, "scenes": scenes, "visitors": VISITORS, "system": SYSTEM_PROMPT, "limits": limits}
    return f"export default {json.dumps(data, ensure_ascii=False)}"
