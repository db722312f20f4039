"""The contractions of the VQA evaluation, and how they are spelt without an apostrophe.

The table of GT-Vision-Lab/VQA, which VLMEvalKit has taken over (`vlmeval/dataset/utils/vqa_eval.py`), built
here from the rule that it follows: the key of an entry is the contraction with one apostrophe missing. Left out
are entries that map a word to itself or that have capitals, which the lower-cased text never has.
"""

_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""

CONTRACTIONS = {
    spelt[:place] + spelt[place + 1 :]: spelt
    for spelt in _CONTRACTIONS.split()
    for place, letter in enumerate(spelt)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the VQA evaluation
"""From a spelling without one apostrophe to the contraction."""
