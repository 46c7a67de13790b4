"""Makes the sample on which the quickstart trains: a small world in Chinese with some English.

    python dataset/sample/make_sample.py                    rewrites the files beside this script

    pretrain.jsonl   {"text"}                               short texts that state the facts of the world
    sft.jsonl        {"conversations"}                      questions and answers, one to four exchanges
    valid.jsonl      {"text"}                               more such texts, for the validation loss
    questions.jsonl  {"category", "rule", "question", "answer"}  what scripts/evaluate.py asks
    choices.jsonl    {"query", "choices", "gold", "subject"}     the same with four answers to choose from
    tools.jsonl      {"conversations"}                      two exchanges with a calculator at hand: long sums are
                                                            called for, in one step or two, all else is not
    tool_questions.jsonl  {"conversations"}                 what scripts/eval_toolcall.py asks

The world is made of facts. A fact has one answer, several wordings (questions that it answers) and several statements
(sentences that state it). No question of questions.jsonl is trained on; each is held out in one of two ways:

- rule false (the capital of France): the fact is trained on, but not in this wording. Other facts use the wording, so
  that the model has to put a known wording and a known fact together.
- rule true (7+8): the fact itself appears nowhere, in no wording, no statement and not with its operands exchanged.
  Enough of its neighbours appear that the rule can be found.

Standard library only. Everything follows from SEED through random.random(), the one method whose sequence Python
promises to keep, so that every machine and every Python version writes the same bytes.
"""

import argparse
import json
import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

SEED = 20250
FOLDER = Path(__file__).resolve().parent


class Dice:
    """Choices made with random.random() alone: choice, sample and shuffle may change between Python versions."""

    def __init__(self, name: str):
        self.random = random.Random(f"{SEED}/{name}").random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def chance(self, share: float) -> bool:
        return self.random() < share

    def pick(self, items):
        return items[self.below(len(items))]

    def shuffled(self, items) -> list:
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items


@dataclass
class Fact:
    """`family` names a set of facts that are held out together, for example 7+8 and 8+7."""

    category: str
    answer: str
    wordings: list[str]
    statements: list[str]
    rule: bool = False
    family: tuple = ()
    trained: bool = True
    held_out: set[int] = field(default_factory=set)  # wordings of a trained fact that are kept for the questions


# ----------------------------------------------------------------------------------------------------------------------
# The world

NAMES = "小明 小红 小华 小丽 小刚 小芳 小军 小雨 小雪 小林".split()
DIGITS = "零一二三四五六七八九"

IDENTITY = [
    (["你是谁", "你叫什么名字", "你叫什么", "你的名字是什么", "怎么称呼你"], "我是MiniMind，一个很小的语言模型。"),
    (["你是人吗", "你是真人吗", "你是人还是机器", "和我说话的是人还是机器"], "我不是人，我是一个语言模型。"),
    (["谁训练了你", "是谁把你训练出来的", "谁创造了你", "你是谁做出来的"], "我是用MiniMind项目的代码从零训练出来的。"),
    (
        ["你会做什么", "你有什么本领", "你能帮我做什么", "你有哪些用处"],
        "我会算小小的加减法，会比大小，还会背几首古诗。",
    ),
    (["你会说哪些语言", "你懂哪几种语言", "你说什么语言", "你能用什么语言聊天"], "我会说中文，也会一点英语。"),
    (["你有多大", "你有多少参数", "你的模型大不大", "你的参数多不多"], "我很小，只有几百万个参数。"),
    (["你是怎么学习的", "你从哪里学到知识", "你的知识从哪里来", "你是看什么学会的"], "我从一小份示例数据里学习。"),
    (["你会犯错吗", "你的回答一定对吗", "你会不会说错", "你说的都是对的吗"], "我会犯错，重要的事情请你再查一查。"),
    (["你会背古诗吗", "你会念古诗吗", "你背得出古诗吗"], "会，我会背几首唐诗。"),
    (["你会做加法吗", "你能算加减法吗", "你会不会算术"], "会，我会算二十以内的加减法。"),
    (["你要吃饭吗", "你肚子饿不饿", "你平时吃什么"], "我不吃饭，有电就可以工作。"),
    (["你要睡觉吗", "你晚上睡觉吗", "你困不困"], "我不睡觉，随时可以回答你。"),
    (["你住在哪里", "你的家在哪里", "你在什么地方"], "我住在你的电脑里。"),
    (["你有身体吗", "你有手和脚吗", "你长什么样"], "我没有身体，我只是一个程序。"),
]
MANNERS = [
    (["你好", "您好", "嗨", "你好呀", "早上好", "晚上好", "下午好"], "你好，我是MiniMind，很高兴和你聊天。"),
    (["谢谢", "谢谢你", "多谢", "太感谢了", "谢谢你的帮助"], "不客气，有问题再来问我。"),
    (["再见", "拜拜", "我走了", "下次再聊", "明天见"], "再见，祝你今天愉快。"),
    (["Hello", "Hi", "Hi there", "Good morning"], "Hello, I am MiniMind. Nice to meet you."),
    (["Thank you", "Thanks", "Thanks a lot"], "You are welcome."),
    (["Goodbye", "Bye", "See you"], "Goodbye, have a nice day."),
]
IDENTITY_FRAMES = ["{}？", "请问{}？", "我想知道{}。", "告诉我{}。", "你好，{}？", "MiniMind，{}？", "我想问问，{}？"]

CAPITALS = """中国 北京 日本 东京 韩国 首尔 朝鲜 平壤 蒙古 乌兰巴托 越南 河内 泰国 曼谷 老挝 万象 柬埔寨 金边
马来西亚 吉隆坡 菲律宾 马尼拉 印度 新德里 尼泊尔 加德满都 伊朗 德黑兰 伊拉克 巴格达 土耳其 安卡拉 俄罗斯 莫斯科
英国 伦敦 法国 巴黎 德国 柏林 意大利 罗马 西班牙 马德里 葡萄牙 里斯本 荷兰 阿姆斯特丹 比利时 布鲁塞尔 瑞士 伯尔尼
奥地利 维也纳 希腊 雅典 波兰 华沙 捷克 布拉格 匈牙利 布达佩斯 瑞典 斯德哥尔摩 挪威 奥斯陆 芬兰 赫尔辛基 丹麦 哥本哈根
爱尔兰 都柏林 埃及 开罗 肯尼亚 内罗毕 美国 华盛顿 加拿大 渥太华 古巴 哈瓦那 智利 圣地亚哥 秘鲁 利马 澳大利亚 堪培拉
新西兰 惠灵顿""".split()
CAPITAL_WORDINGS = [
    "{0}的首都是哪里？",
    "{0}的首都是哪座城市？",
    "{0}的首都叫什么？",
    "哪座城市是{0}的首都？",
    "哪里是{0}的首都？",
    "{0}的首都在哪里？",
    "说出{0}的首都。",
]
COUNTRY_WORDINGS = ["{1}是哪个国家的首都？", "{1}是哪国的首都？", "哪个国家的首都是{1}？", "首都是{1}的是哪个国家？"]

OPPOSITES = """大 小 多 少 高 矮 长 短 快 慢 冷 热 上 下 左 右 前 后 里 外 黑 白 远 近 轻 重 新 旧 早 晚 开 关 来 去
进 出 买 卖 哭 笑 胖 瘦 厚 薄 粗 细 宽 窄 软 硬 干 湿 深 浅 强 弱 真 假 美 丑 老 幼 男 女 公 母 天 地 日 夜 生 死
有 无 对 错 好 坏 饿 饱 甜 苦 香 臭 贵 便宜 安静 吵闹 干净 肮脏 勤劳 懒惰 勇敢 胆小 简单 复杂 容易 困难 安全 危险
成功 失败 胜利 战败 快乐 悲伤 聪明 愚笨 光明 黑暗 开始 结束 增加 减少 升高 降低 朋友 敌人 富裕 贫穷 骄傲 谦虚
温暖 寒冷""".split()
OPPOSITE_WORDINGS = [
    "“{0}”的反义词是什么？",
    "{0}的反义词是什么？",
    "“{0}”的反义词是哪个词？",
    "和“{0}”意思相反的词是什么？",
    "哪个词和“{0}”意思相反？",
    "“{0}”反过来怎么说？",
    "说出“{0}”的反义词。",
]

COLOURS = """天空 蓝 大海 蓝 草地 绿 树叶 绿 竹子 绿 黄瓜 绿 菠菜 绿 西瓜皮 绿 青蛙 绿 雪 白 云 白 牛奶 白 盐 白
豆腐 白 米饭 白 棉花 白 北极熊 白 煤 黑 墨水 黑 乌鸦 黑 木炭 黑 夜空 黑 香蕉 黄 柠檬 黄 玉米 黄 向日葵 黄 蛋黄 黄
小鸭 黄 血 红 草莓 红 樱桃 红 西红柿 红 消防车 红 五星红旗 红 胡萝卜 橙 橘子 橙 茄子 紫 薰衣草 紫 桃花 粉 火烈鸟 粉
大象 灰 老鼠 灰 巧克力 棕 咖啡豆 棕""".split()
COLOUR_WORDINGS = [
    "{0}是什么颜色的？",
    "{0}是什么颜色？",
    "{0}的颜色是什么？",
    "{0}是哪种颜色的？",
    "{0}看上去是什么颜色？",
    "说出{0}的颜色。",
]
MIXED_COLOURS = [("红", "黄", "橙"), ("黄", "蓝", "绿"), ("红", "蓝", "紫"), ("黑", "白", "灰"), ("红", "白", "粉")]
MIXED_COLOUR_WORDINGS = [
    "{0}色和{1}色混在一起是什么颜色？",
    "{0}色加{1}色变成什么颜色？",
    "把{0}色和{1}色混合会得到什么颜色？",
    "{0}色颜料和{1}色颜料调在一起是什么颜色？",
    "{0}色和{1}色能调出什么颜色？",
]

SOUNDS = """猫 喵喵 狗 汪汪 牛 哞哞 羊 咩咩 鸭子 嘎嘎 公鸡 喔喔 母鸡 咯咯 小鸡 叽叽 青蛙 呱呱 老鼠 吱吱 蜜蜂 嗡嗡
猪 哼哼 鸽子 咕咕 布谷鸟 布谷 喜鹊 喳喳 麻雀 啾啾 狼 嗷嗷 蟋蟀 唧唧 蛇 嘶嘶 知了 知了""".split()
SOUND_WORDINGS = [
    "{0}怎么叫？",
    "{0}的叫声是什么？",
    "{0}是怎么叫的？",
    "{0}的叫声是什么样的？",
    "{0}会发出什么声音？",
    "学一学{0}叫。",
]
LEGS = """猫 4 狗 4 牛 4 马 4 羊 4 猪 4 老虎 4 大象 4 兔子 4 老鼠 4 青蛙 4 鸡 2 鸭子 2 鸽子 2 麻雀 2 蜜蜂 6 蚂蚁 6
蝴蝶 6 蜘蛛 8""".split()
LEG_WORDINGS = ["{0}有几条腿？", "{0}有多少条腿？", "{0}长着几条腿？", "{0}的腿有几条？", "一只{0}有几条腿？"]
FOODS = """大熊猫 竹子 牛 草 羊 草 马 草 蚕 桑叶 猫 鱼 狗 骨头 猴子 桃子 兔子 萝卜 松鼠 松子 老虎 肉 青蛙 虫子
老鼠 大米 蜜蜂 花蜜 啄木鸟 虫子 狮子 肉""".split()
FOOD_WORDINGS = ["{0}爱吃什么？", "{0}喜欢吃什么？", "{0}最爱吃什么？", "{0}平时吃什么？", "什么是{0}爱吃的？"]

POEMS = [
    ("静夜思", "李白", "床前明月光，疑是地上霜。举头望明月，低头思故乡。"),
    ("春晓", "孟浩然", "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"),
    ("登鹳雀楼", "王之涣", "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"),
    ("相思", "王维", "红豆生南国，春来发几枝。愿君多采撷，此物最相思。"),
    ("江雪", "柳宗元", "千山鸟飞绝，万径人踪灭。孤舟蓑笠翁，独钓寒江雪。"),
    ("悯农", "李绅", "锄禾日当午，汗滴禾下土。谁知盘中餐，粒粒皆辛苦。"),
    ("寻隐者不遇", "贾岛", "松下问童子，言师采药去。只在此山中，云深不知处。"),
    ("鹿柴", "王维", "空山不见人，但闻人语响。返景入深林，复照青苔上。"),
    ("绝句", "杜甫", "两个黄鹂鸣翠柳，一行白鹭上青天。窗含西岭千秋雪，门泊东吴万里船。"),
    ("早发白帝城", "李白", "朝辞白帝彩云间，千里江陵一日还。两岸猿声啼不住，轻舟已过万重山。"),
    ("望庐山瀑布", "李白", "日照香炉生紫烟，遥看瀑布挂前川。飞流直下三千尺，疑是银河落九天。"),
    ("清明", "杜牧", "清明时节雨纷纷，路上行人欲断魂。借问酒家何处有，牧童遥指杏花村。"),
    ("赋得古原草送别", "白居易", "离离原上草，一岁一枯荣。野火烧不尽，春风吹又生。"),
    ("风", "李峤", "解落三秋叶，能开二月花。过江千尺浪，入竹万竿斜。"),
]
POEM_WORDINGS = [
    "“{0}”的下一句是什么？",
    "“{0}”下一句是什么？",
    "“{0}”后面一句是什么？",
    "古诗里“{0}”的后一句是什么？",
    "“{0}”接下来是哪一句？",
    "请接下一句：{0}。",
]
AUTHOR_WORDINGS = [
    "《{0}》的作者是谁？",
    "《{0}》是谁写的？",
    "谁写了《{0}》？",
    "《{0}》是哪位诗人写的？",
    "写《{0}》的诗人是谁？",
]

WORDS = """apple 苹果 banana 香蕉 pear 梨 peach 桃子 cat 猫 dog 狗 bird 鸟 fish 鱼 horse 马 cow 牛 sheep 羊 pig 猪
duck 鸭子 tiger 老虎 lion 狮子 monkey 猴子 rabbit 兔子 book 书 pen 钢笔 desk 书桌 chair 椅子 door 门 window 窗户
school 学校 teacher 老师 student 学生 water 水 milk 牛奶 tea 茶 bread 面包 egg 鸡蛋 meat 肉 sun 太阳 moon 月亮
star 星星 sky 天空 sea 大海 river 河 mountain 山 tree 树 flower 花 grass 草 rain 雨 snow 雪 wind 风 fire 火 car 汽车
train 火车 plane 飞机 ship 船 father 爸爸 mother 妈妈 friend 朋友 hand 手 foot 脚 eye 眼睛 ear 耳朵 nose 鼻子
mouth 嘴巴 red 红色 green 绿色 blue 蓝色 white 白色 black 黑色""".split()
ENGLISH_OF_WORDINGS = [
    "“{1}”用英语怎么说？",
    "{1}的英语是什么？",
    "“{1}”的英文怎么写？",
    "{1}用英文怎么说？",
    "怎么用英语说“{1}”？",
    "把“{1}”翻译成英语。",
]
CHINESE_OF_WORDINGS = [
    "{0}是什么意思？",
    "英语单词{0}是什么意思？",
    "{0}的中文意思是什么？",
    "{0}用中文怎么说？",
    "单词{0}的意思是什么？",
    "把{0}翻译成中文。",
]

WEEK = [f"星期{c}" for c in "一二三四五六日"]
MONTHS = [f"{n}月" for n in "一 二 三 四 五 六 七 八 九 十 十一 十二".split()]
SEASONS = "春天 夏天 秋天 冬天".split()
ZODIAC = "鼠 牛 虎 兔 龙 蛇 马 羊 猴 鸡 狗 猪".split()
DAY_AFTER = [
    "{0}的后一天是星期几？",
    "{0}后面是星期几？",
    "{0}过后是星期几？",
    "今天是{0}，明天是星期几？",
    "如果今天是{0}，那么明天是星期几？",
]
DAY_BEFORE = [
    "{0}的前一天是星期几？",
    "{0}前面是星期几？",
    "{0}之前是星期几？",
    "今天是{0}，昨天是星期几？",
    "如果今天是{0}，那么昨天是星期几？",
]
MONTH_AFTER = ["{0}的下一个月是几月？", "{0}后面是几月？", "{0}过后是几月？", "这个月是{0}，下个月是几月？"]
MONTH_BEFORE = ["{0}的上一个月是几月？", "{0}前面是几月？", "{0}之前是几月？", "这个月是{0}，上个月是几月？"]
SEASON_AFTER = ["{0}过后是什么季节？", "{0}的下一个季节是什么？", "{0}后面是哪个季节？", "{0}过去了，接着是什么季节？"]
ZODIAC_AFTER = [
    "十二生肖里{0}的后面是什么？",
    "生肖{0}的下一个是什么？",
    "十二生肖中排在{0}后面的是谁？",
    "十二生肖里{0}的下一个是谁？",
]
MEASURES = [
    ("一年", "个月", "12"),
    ("一个星期", "天", "7"),
    ("一天", "个小时", "24"),
    ("一小时", "分钟", "60"),
    ("一分钟", "秒", "60"),
    ("一年", "个季节", "4"),
    ("一双筷子", "根", "2"),
    ("一只手", "根手指", "5"),
    ("三角形", "条边", "3"),
    ("正方形", "条边", "4"),
]
MEASURE_WORDINGS = ["{0}有几{1}？", "{0}有多少{1}？", "{0}一共有多少{1}？", "{0}总共有几{1}？"]

ENGLISH_CAPITALS = """China Beijing Japan Tokyo France Paris Germany Berlin Italy Rome Spain Madrid Russia Moscow
Egypt Cairo Greece Athens Canada Ottawa England London Thailand Bangkok""".split()
ENGLISH_OPPOSITES = """big small hot cold long short fast slow good bad new old up down left right black white
open close day night happy sad rich poor""".split()
ENGLISH_COLOURS = """sky blue grass green snow white coal black blood red milk white banana yellow lemon yellow
carrot orange strawberry red""".split()
ENGLISH_SOUNDS = "cat meow dog woof cow moo sheep baa duck quack pig oink bee buzz lion roar snake hiss".split()
ENGLISH_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ENGLISH_IDENTITY = [
    (
        ["Who are you?", "What is your name?", "Tell me your name.", "What are you called?"],
        "I am MiniMind, a small language model.",
    ),
    (["Are you a human?", "Are you a real person?", "Are you human or a machine?"], "No, I am a language model."),
    (["What can you do?", "What are you able to do?", "How can you help me?"], "I can answer simple questions."),
]

ITEMS = list("猫狗鸟鱼马牛羊猪书笔门水茶雨雪风山河花草树船手灯梨车云海")
SUM_WORDINGS = [
    "{a}+{b}=",
    "{a}+{b}等于几？",
    "{a}加{b}等于几？",
    "{a}加{b}等于多少？",
    "{a}加上{b}是多少？",
    "{a}和{b}的和是多少？",
    "计算{a}+{b}。",
    "{n}有{a}个苹果，又买了{b}个，一共有几个苹果？",
    "树上有{a}只鸟，又飞来{b}只，现在有几只鸟？",
]
DIFFERENCE_WORDINGS = [
    "{a}-{b}=",
    "{a}-{b}等于几？",
    "{a}减{b}等于几？",
    "{a}减{b}等于多少？",
    "{a}减去{b}是多少？",
    "{a}与{b}的差是多少？",
    "计算{a}-{b}。",
    "{n}有{a}个苹果，吃了{b}个，还剩几个苹果？",
    "树上有{a}只鸟，飞走{b}只，还有几只鸟？",
]
LARGER_WORDINGS = [
    "{a}和{b}哪个大？",
    "{a}和{b}哪个数更大？",
    "{a}与{b}相比，谁大？",
    "{a}和{b}中较大的是哪个？",
    "比一比，{a}和{b}谁大？",
]
SMALLER_WORDINGS = [
    "{a}和{b}哪个小？",
    "{a}和{b}哪个数更小？",
    "{a}与{b}相比，谁小？",
    "{a}和{b}中较小的是哪个？",
    "比一比，{a}和{b}谁小？",
]
SUCCESSOR_WORDINGS = [
    "{a}后面的数是几？",
    "{a}的下一个数是几？",
    "比{a}大1的数是多少？",
    "数数的时候，{a}后面是几？",
    "紧跟在{a}后面的是哪个数？",
]
PREDECESSOR_WORDINGS = [
    "{a}前面的数是几？",
    "{a}的上一个数是几？",
    "比{a}小1的数是多少？",
    "数数的时候，{a}前面是几？",
    "紧挨在{a}前面的是哪个数？",
]
PLACE_WORDINGS = [
    "{a}个十和{b}个一是多少？",
    "{a}个十加{b}个一组成几？",
    "十位是{a}、个位是{b}的数是几？",
    "{a}个十和{b}个一合起来是多少？",
]
NTH_WORDINGS = [
    "{l}，第{o}个是什么？",
    "在{l}里，第{o}个是什么？",
    "有{l}，第{o}个是哪个？",
    "{l}，排在第{o}的是什么？",
]
REVERSE_WORDINGS = ["把{l}倒过来说。", "倒着说：{l}。", "请把{l}反过来念。", "{l}倒过来怎么说？"]


def pairs(flat: list) -> list[tuple]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def table_facts(category: str, rows, wordings: list[str], answer: str, statements: list[str]) -> list[Fact]:
    """One fact for every row; {0}, {1} … in the patterns stand for the row's columns. The answer is a statement too."""
    return [
        Fact(
            category,
            answer.format(*row),
            [wording.format(*row) for wording in wordings],
            [statement.format(*row) for statement in [answer, *statements]],
        )
        for row in rows
    ]


def following(items: list[str]) -> list[tuple[str, str]]:
    return [(item, items[(i + 1) % len(items)]) for i, item in enumerate(items)]


def preceding(items: list[str]) -> list[tuple[str, str]]:
    return [(item, items[i - 1]) for i, item in enumerate(items)]


def known_facts() -> list[Fact]:
    facts = []

    def add(category, rows, wordings, answer, *statements):
        facts.extend(table_facts(category, rows, wordings, answer, list(statements)))

    for cores, answer in IDENTITY:
        framed = [
            frame.format(core) for core in cores for frame in IDENTITY_FRAMES if frame[-1] == "？" or core[-1] != "吗"
        ]
        facts.append(Fact("identity", answer, framed, [answer]))

    capitals = pairs(CAPITALS)
    add(
        "capitals", capitals, CAPITAL_WORDINGS, "{0}的首都是{1}。", "{1}是{0}的首都。", "{1}是一座城市，它是{0}的首都。"
    )
    add("capitals", capitals, COUNTRY_WORDINGS, "{1}是{0}的首都。", "{0}的首都叫{1}。")

    opposites = pairs(OPPOSITES)
    opposites += [(b, a) for a, b in opposites]
    add(
        "opposites",
        opposites,
        OPPOSITE_WORDINGS,
        "“{0}”的反义词是“{1}”。",
        "“{0}”和“{1}”是一对反义词。",
        "“{0}”与“{1}”意思相反。",
    )

    add("colours", pairs(COLOURS), COLOUR_WORDINGS, "{0}是{1}色的。", "看，{0}是{1}色的！", "{0}的颜色是{1}色。")
    mixed = MIXED_COLOURS + [(b, a, c) for a, b, c in MIXED_COLOURS]
    add("colours", mixed, MIXED_COLOUR_WORDINGS, "{0}色和{1}色混在一起是{2}色。", "{0}色加{1}色变成{2}色。")

    add("animals", pairs(SOUNDS), SOUND_WORDINGS, "{0}的叫声是“{1}”。", "{0}“{1}”地叫。", "“{1}”，{0}叫了起来。")
    add("animals", pairs(LEGS), LEG_WORDINGS, "{0}有{1}条腿。", "{0}长着{1}条腿。")
    add("animals", pairs(FOODS), FOOD_WORDINGS, "{0}爱吃{1}。", "{0}喜欢吃{1}。")

    for _, _, text in POEMS:
        lines = re.findall(r"[^，。]+", text)
        add("poems", list(zip(lines, lines[1:], strict=False)), POEM_WORDINGS, "{1}。", "{0}，{1}。")
    add("poems", POEMS, AUTHOR_WORDINGS, "《{0}》的作者是{1}。", "唐代诗人{1}写了《{0}》。")

    words = pairs(WORDS)
    add("words", words, ENGLISH_OF_WORDINGS, "“{1}”的英语是{0}。", "“{1}”用英语说是{0}。")
    add("words", words, CHINESE_OF_WORDINGS, "{0}的意思是“{1}”。", "英语单词{0}的意思是“{1}”。")

    add("calendar", following(WEEK), DAY_AFTER, "{0}的后一天是{1}。", "过完{0}就是{1}。")
    add("calendar", preceding(WEEK), DAY_BEFORE, "{0}的前一天是{1}。", "{1}过了就是{0}。")
    add("calendar", following(MONTHS), MONTH_AFTER, "{0}的下一个月是{1}。", "{0}过后就是{1}。")
    add("calendar", preceding(MONTHS), MONTH_BEFORE, "{0}的上一个月是{1}。", "{1}过后就是{0}。")
    add("calendar", following(SEASONS), SEASON_AFTER, "{0}过后是{1}。", "{0}走了，{1}来了。")
    add("calendar", following(ZODIAC), ZODIAC_AFTER, "生肖{0}的后面是{1}。", "十二生肖里，{0}排在{1}的前面。")
    add("calendar", MEASURES, MEASURE_WORDINGS, "{0}有{2}{1}。")

    capital_of = [
        "What is the capital of {0}?",
        "Which city is the capital of {0}?",
        "Tell me the capital of {0}.",
        "Name the capital of {0}.",
    ]
    add("english", pairs(ENGLISH_CAPITALS), capital_of, "The capital of {0} is {1}.", "{1} is the capital of {0}.")
    opposite_of = [
        "What is the opposite of {0}?",
        "Which word is the opposite of {0}?",
        "Tell me the opposite of {0}.",
        "Name the opposite of {0}.",
    ]
    english_opposites = pairs(ENGLISH_OPPOSITES)
    english_opposites += [(b, a) for a, b in english_opposites]
    add("english", english_opposites, opposite_of, "The opposite of {0} is {1}.")
    colour_of = [
        "What colour is {0}?",
        "What is the colour of {0}?",
        "Tell me the colour of {0}.",
        "Which colour does {0} have?",
    ]
    add("english", [(with_article(n), c) for n, c in pairs(ENGLISH_COLOURS)], colour_of, "The colour of {0} is {1}.")
    sound_of = [
        "What sound does a {0} make?",
        "What does a {0} say?",
        "Which sound does a {0} make?",
        "Tell me the sound of a {0}.",
    ]
    add("english", pairs(ENGLISH_SOUNDS), sound_of, "A {0} says {1}.")
    day_after = [
        "What day comes after {0}?",
        "Which day comes after {0}?",
        "What is the day after {0}?",
        "Tell me the day after {0}.",
    ]
    add("english", following(ENGLISH_DAYS), day_after, "The day after {0} is {1}.", "{1} comes after {0}.")
    for wordings, answer in ENGLISH_IDENTITY:
        facts.append(Fact("manners", answer, list(wordings), [answer]))
    for wordings, answer in MANNERS:
        facts.append(Fact("manners", answer, list(wordings), []))
    return facts


def with_article(noun: str) -> str:
    articles = {"sky": "the", "banana": "a", "lemon": "a", "carrot": "a", "strawberry": "a"}
    return f"{articles[noun]} {noun}" if noun in articles else noun


def counted(a: int, sign: str, b: int) -> str:
    """A sum or difference as a child counts it out on its fingers: 8+5：1:9，2:10，3:11，4:12，5:13。8+5=13。

    A table of sums can only be learned by heart; this is a rule that a very small model finds: each step is the number
    after, or before, the last one, and the counter says when to stop.
    """
    by = 1 if sign == "+" else -1
    result = f"{a}{sign}{b}={a + by * b}。"
    counting = "，".join(f"{i}:{a + by * i}" for i in range(1, b + 1))
    return f"{a}{sign}{b}：{counting}。{result}" if b else result


def rule_facts(dice: Dice) -> list[Fact]:
    facts = []

    def add(category, family, wordings, answer, statements, **values):
        names = {"n": dice.pick(NAMES), **values}
        asked = [wording.format(**names) for wording in wordings]
        stated = [statement.format(**names) for statement in statements]
        facts.append(Fact(category, answer.format(**names), asked, stated, rule=True, family=(category, *family)))

    for a in range(21):
        for b in range(min(20 - a, 10) + 1):
            family = (min(a, b), max(a, b))
            add("sums", family, SUM_WORDINGS, counted(a, "+", b), [counted(a, "+", b)], a=a, b=b)
    for a in range(21):
        for b in range(min(a, 10) + 1):
            add("differences", (a, b), DIFFERENCE_WORDINGS, counted(a, "-", b), [counted(a, "-", b)], a=a, b=b)

    every_pair = [(a, b) for a in range(100) for b in range(100) if a != b]
    small = [(a, b) for a, b in every_pair if max(a, b) <= 20]
    large = dice.shuffled([(a, b) for a, b in every_pair if max(a, b) > 20])[:2200]
    for i, (a, b) in enumerate(small + large):
        family = (min(a, b), max(a, b))
        values = dict(a=a, b=b, s="<" if a < b else ">", x=max(a, b), y=min(a, b))
        asked = i < 1200
        if dice.chance(0.5):
            answer = "{a}{s}{b}，{x}大。"
            add("comparing", family, LARGER_WORDINGS if asked else [], answer, [answer], **values)
        else:
            answer = "{a}{s}{b}，{y}小。"
            add("comparing", family, SMALLER_WORDINGS if asked else [], answer, [answer], **values)

    for a in range(100):
        add(
            "neighbours",
            ("after", a),
            SUCCESSOR_WORDINGS,
            "{a}后面的数是{c}。",
            ["{a}后面的数是{c}。", "比{a}大1的数是{c}。"],
            a=a,
            c=a + 1,
        )
    for a in range(1, 101):
        add(
            "neighbours",
            ("before", a),
            PREDECESSOR_WORDINGS,
            "{a}前面的数是{c}。",
            ["{a}前面的数是{c}。", "比{a}小1的数是{c}。"],
            a=a,
            c=a - 1,
        )
    for a in range(1, 10):
        for b in range(1, 10):
            add(
                "places",
                (a, b),
                PLACE_WORDINGS,
                "{a}个十和{b}个一是{c}。",
                ["{a}个十和{b}个一是{c}。"],
                a=a,
                b=b,
                c=10 * a + b,
            )

    for i in range(2000):
        words = dice.shuffled(ITEMS)[: 3 + dice.below(2)]
        o = dice.below(len(words))
        values = dict(l="、".join(words), r="、".join(words[::-1]), o=DIGITS[o + 1], w=words[o])
        places = "，".join(f"第{DIGITS[k]}个是{word}" for k, word in enumerate(words, 1))
        if i < 600:
            add("lists", tuple(words), NTH_WORDINGS, "第{o}个是{w}。", ["{l}，第{o}个是{w}。"], **values)
        elif i < 1200:
            add("lists", tuple(words), REVERSE_WORDINGS, "{r}。", ["把{l}倒过来就是{r}。"], **values)
        else:
            add("lists", tuple(words), [], "", ["{l}，" + places + "，倒过来就是{r}。"], **values)
    return facts


# ----------------------------------------------------------------------------------------------------------------------
# What is held out

# category -> how many facts are asked about. A third or more of all questions are about rules.
ASKED = {
    "identity": 24,
    "capitals": 30,
    "opposites": 30,
    "colours": 20,
    "animals": 24,
    "poems": 24,
    "words": 30,
    "calendar": 24,
    "english": 24,
    "sums": 28,
    "differences": 28,
    "comparing": 30,
    "neighbours": 24,
    "places": 12,
    "lists": 30,
}


def hold_out(facts: list[Fact]) -> list[dict]:
    """Marks what is kept out of training in `held_out` and returns the questions about it."""
    questions = []
    for category, count in ASKED.items():
        dice = Dice(f"questions/{category}")
        members = [fact for fact in facts if fact.category == category]
        if members[0].rule:
            asked = hold_out_families(members, count, dice)
        else:
            asked = hold_out_wordings(members, count, dice)
        for fact, wording in asked:
            question = fact.wordings[wording]
            questions.append({"category": category, "rule": fact.rule, "question": question, "answer": fact.answer})
    return questions


def hold_out_wordings(members: list[Fact], count: int, dice: Dice) -> list[tuple[Fact, int]]:
    """A wording for each of `count` facts, going round when there are fewer facts than that."""
    order = dice.shuffled(members)
    asked = []
    for i in range(count):
        fact = order[i % len(order)]
        free = [w for w in range(len(fact.wordings)) if w not in fact.held_out]
        wording = dice.pick(free)
        fact.held_out.add(wording)
        asked.append((fact, wording))
    return asked


def may_be_held_out(fact: Fact) -> bool:
    """Rules bend at the border (0, the largest number), and a border lacks the neighbours to learn it from."""
    kind, *values = fact.family
    if kind in ("sums", "differences"):
        a, b = values
        return min(a, b) >= 2 and abs(a - b) >= 1
    if kind == "neighbours":
        return 10 < values[1] < 99 and (values[1] % 10 != 9 if values[0] == "after" else values[1] % 10 != 0)
    return True


def hold_out_families(members: list[Fact], count: int, dice: Dice) -> list[tuple[Fact, int]]:
    families: dict[tuple, list[Fact]] = {}
    for fact in members:
        families.setdefault(fact.family, []).append(fact)
    asked: list[tuple[Fact, int]] = []
    for family in dice.shuffled(families.values()):
        askable = [fact for fact in family if fact.wordings]
        if len(asked) >= count or not askable or not may_be_held_out(family[0]):
            continue
        kind, *values = family[0].family
        turned_round = families.get((kind, *values[::-1]), []) if kind == "lists" else []  # its answer spells this list
        for fact in [*family, *turned_round]:
            fact.trained = False
        asked += [(fact, dice.below(len(fact.wordings))) for fact in askable[:2]]
    return asked


# ----------------------------------------------------------------------------------------------------------------------
# Training conversations

# category -> how many wordings of a fact are trained on in one pass over sft.jsonl
WORDINGS_TRAINED = {
    "identity": 20,
    "manners": 12,
    "capitals": 8,
    "opposites": 9,
    "colours": 8,
    "animals": 8,
    "poems": 7,
    "words": 7,
    "calendar": 9,
    "english": 7,
    "sums": 6,
    "differences": 6,
    "comparing": 1,
    "neighbours": 4,
    "places": 4,
    "lists": 1,
}
FRAMES = ["请问{}？", "我想知道{}。", "告诉我{}。", "你知道{}吗？", "请问，{}？"]


def phrase(wording: str, dice: Dice) -> str:
    """People begin and end a question in different ways, or leave the question mark out."""
    if wording.endswith("？"):
        core = wording[:-1]
        if dice.chance(0.25):
            return dice.pick(FRAMES).format(core)
        return core + ("？" if dice.chance(0.75) else dice.pick(["", "?"]))
    if wording.endswith("=") and dice.chance(0.4):
        return wording + dice.pick(["?", "？"])
    return wording


def exchanges(facts: list[Fact]) -> list[tuple[str, str]]:
    dice = Dice("exchanges")
    made = []
    for fact in facts:
        trained = [w for i, w in enumerate(fact.wordings) if i not in fact.held_out]
        if not fact.trained or not trained:
            continue
        wanted = WORDINGS_TRAINED[fact.category]
        chosen = dice.shuffled(trained)[:wanted]
        while len(chosen) < wanted:
            chosen.append(dice.pick(trained))
        made += [(w if fact.category in ("identity", "manners") else phrase(w, dice), fact.answer) for w in chosen]
    return dice.shuffled(made)


def conversations(facts: list[Fact]) -> list[dict]:
    dice = Dice("conversations")
    queue = exchanges(facts)
    made = []
    while queue:
        length = dice.pick([1, 1, 2, 3, 3, 4])
        turns = []
        for question, answer in queue[:length]:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        queue = queue[length:]
        made.append({"conversations": turns})
    return made


# ----------------------------------------------------------------------------------------------------------------------
# Tools: sums too long for the head go to the calculator

CALCULATOR = {  # as dataset/tools.py offers it
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Work out an arithmetic expression",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
SPOKEN = {"+": "加", "-": "减"}
ONE_STEP = ["{a}{s}{b}等于多少？", "{a}{w}{b}等于几？", "算一算{a}{s}{b}。"]
TWO_STEPS = ["{a}{s}{b}{s}{c}等于多少？", "{a}{w}{b}再{w}{c}等于几？", "算一算{a}{s}{b}{s}{c}。"]
TOOL_CONVERSATIONS, TOOL_EXCHANGES = 250, 2


def long_sum(steps: int, dice: Dice, seen: set[tuple[int, int]]) -> list[dict]:
    """Return the turns of a sum of three-digit numbers: the question, a call and its result for each step, the answer.

    Two steps have the same sign. seen: the pairs that sums have begun with, in either order; this one's is added.
    """
    while True:
        a, b, c = (100 + dice.below(900) for _ in range(3))
        s = dice.pick("+-")
        first, second = (a + b, a + b + c) if s == "+" else (a - b, a - b - c)
        if (a, b) not in seen and min(first, second) >= 0:
            break
    seen |= {(a, b), (b, a)}
    wording = dice.pick(ONE_STEP if steps == 1 else TWO_STEPS)
    turns = [{"role": "user", "content": wording.format(a=a, b=b, c=c, s=s, w=SPOKEN[s])}]
    for expression, result in [(f"{a}{s}{b}", first), (f"{first}{s}{c}", second)][:steps]:
        call = {"name": "calculator", "arguments": {"expression": expression}}
        turns.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]})
        turns.append({"role": "tool", "content": str(result)})
    answer = f"{a}{s}{b}={first}。" if steps == 1 else f"{a}{s}{b}{s}{c}={second}。"
    return [*turns, {"role": "assistant", "content": answer}]


def tool_conversations(facts: list[Fact], questions: list[dict]) -> tuple[list[dict], list[dict]]:
    """Return (trained, asked): conversations that offer the calculator. All else is answered without a call.

    Those asked have one exchange, and no sum in them is trained on.
    """
    dice, seen, plain = Dice("tools"), set(), exchanges(facts)
    counted = [(question, answer) for question, answer in plain if re.match(r"\d+[+-]\d+[：=]", answer)]
    system = {"role": "system", "content": "", "tools": [CALCULATOR]}

    def said(question: str, answer: str) -> list[dict]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    short = [said(q["question"], q["answer"]) for q in questions if q["category"] in ("sums", "differences")]
    asked = [long_sum(steps, dice, seen) for steps in [1] * 50 + [2] * 30] + dice.shuffled(short)[:20]
    trained = []
    for _ in range(TOOL_CONVERSATIONS):
        turns = []
        for _ in range(TOOL_EXCHANGES):
            steps = dice.pick((0, 1, 2, 2))
            turns += long_sum(steps, dice, seen) if steps else said(*dice.pick(dice.pick((plain, counted))))
        trained.append(turns)
    return tuple([{"conversations": [system, *turns]} for turns in part] for part in (trained, dice.shuffled(asked)))


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining texts

STATED = {
    "identity": 10,
    "manners": 4,
    "capitals": 9,
    "opposites": 10,
    "colours": 9,
    "animals": 9,
    "poems": 9,
    "words": 9,
    "calendar": 12,
    "english": 9,
    "sums": 9,
    "differences": 9,
    "comparing": 1,
    "neighbours": 4,
    "places": 3,
    "lists": 1,
}
OPENINGS = {
    "identity": ["下面是MiniMind的自我介绍。", "MiniMind说："],
    "capitals": ["地理课上，{n}记住了这些首都。", "世界上有许多国家，每个国家都有首都。", "老师指着地图说："],
    "opposites": ["语文课上，我们学习反义词。", "{n}把反义词写在本子上。"],
    "colours": ["世界上有很多颜色。", "{n}拿出彩笔，一边画一边说："],
    "animals": ["动物园里真热闹。", "{n}很喜欢小动物。"],
    "poems": ["{n}喜欢背古诗。", "我们来读几句唐诗。"],
    "words": ["英语课上，我们学习单词。", "{n}在背英语单词。"],
    "calendar": ["日子一天一天地过去。", "{n}在看日历。"],
    "english": ["Here are some simple facts.", "Let us learn together.", "The teacher says:"],
    "sums": ["我们来做加法。", "{n}在练习加法。", "老师在黑板上写："],
    "differences": ["我们来做减法。", "{n}在练习减法。", "老师在黑板上写："],
    "comparing": ["我们来比较数的大小。", "{n}在比大小。"],
    "neighbours": ["我们来数数。", "{n}学会了数数。"],
    "places": ["我们来认识十位和个位。", "{n}在摆小棒。"],
    "lists": ["我们来排一排。", "{n}把东西排成一排。"],
}


def statements(facts: list[Fact], dice: Dice) -> dict[str, list[str]]:
    """category -> its statements in random order; a fact whose family is held out is never stated."""
    stated: dict[str, list[str]] = {}
    for fact in facts:
        if fact.trained and fact.statements:
            for i in range(STATED[fact.category] if fact.wordings else 1):
                stated.setdefault(fact.category, []).append(fact.statements[i % len(fact.statements)])
    return {category: dice.shuffled(sentences) for category, sentences in stated.items()}


def texts(facts: list[Fact], dice: Dice) -> list[str]:
    made = []
    for category, sentences in statements(facts, dice).items():
        while sentences:
            length = 4 + dice.below(6)
            body = sentences[:length]
            sentences = sentences[length:]
            gap = " " if category == "english" else ""
            if category in OPENINGS and dice.chance(0.6):
                body.insert(0, dice.pick(OPENINGS[category]).format(n=dice.pick(NAMES)))
            made.append(gap.join(body))
    for title, author, lines in POEMS:
        made += [
            f"《{title}》\n{author}\n{lines}",
            f"《{title}》 {author}：{lines}",
            f"{lines}这首诗是{author}的《{title}》。",
        ] * 2
    return dice.shuffled(made)


def choices(questions: list[dict], dice: Dice) -> list[dict]:
    """Return the same questions, each with three answers to others of its category, and the place of its own among them."""
    made = []
    for question in questions:
        answers = {q["answer"] for q in questions if q["category"] == question["category"]} - {question["answer"]}
        options = dice.shuffled(sorted(answers))[:3]
        gold = dice.below(4)
        options.insert(gold, question["answer"])
        made.append({"query": question["question"], "choices": options, "gold": gold, "subject": question["category"]})
    return made


# ----------------------------------------------------------------------------------------------------------------------


def make_sample() -> dict[str, list[dict]]:
    """File name -> its records."""
    facts = known_facts() + rule_facts(Dice("rules"))
    questions = hold_out(facts)
    pretrain = list(dict.fromkeys(texts(facts, Dice("pretrain"))))
    seen = set(pretrain)
    valid = [text for text in texts(facts, Dice("valid")) if text not in seen][:150]
    with_tools, tool_questions = tool_conversations(facts, questions)
    return {
        "pretrain.jsonl": [{"text": text} for text in pretrain],
        "sft.jsonl": conversations(facts),
        "valid.jsonl": [{"text": text} for text in valid],
        "questions.jsonl": questions,
        "choices.jsonl": choices(questions, Dice("choices")),
        "tools.jsonl": with_tools,
        "tool_questions.jsonl": tool_questions,
    }


def write_sample(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in make_sample().items():
        body = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        beside = folder / f"{name}.{os.getpid()}.tmp"
        beside.write_bytes(body)
        beside.replace(folder / name)
        print(f"{folder / name}: {len(records)} records, {len(body)} bytes")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the small data set that the quickstart trains on.")
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="where (default: beside this script)")
    write_sample(parser.parse_args(argv).output_dir)


if __name__ == "__main__":
    main()
