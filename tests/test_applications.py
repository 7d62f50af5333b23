"Real applications, trained for an epoch: how each batch was mixed is told from what the layers saw, and the loss must follow from it."
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from apps import Before, Spy, close, matrix, mixed_ce, mixed_targets, mixed_tokens, places, plain, quiet, was_mixed
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.data.all import CategoryBlock, ColReader, DataBlock, DataLoader, DataLoaders, IndexSplitter, MultiCategoryBlock, RegressionBlock
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, TextBlock, awd_lstm_clas_config, awd_lstm_lm_config, language_model_learner, text_classifier_learner
from fastai.vision.all import (
    SGD,
    BBoxBlock,
    BBoxLblBlock,
    F,
    ImageBlock,
    Learner,
    MaskBlock,
    PointBlock,
    aug_transforms,
    imagenet_stats,
    nn,
    resnet18,
    unet_learner,
    vision_learner,
    xresnet18,
)
from fastai.vision.all import Normalize as NormalizeImages
from nets import Seq2Seq
from PIL import Image

from fastai_mixup.all import LabelSmoothingCE, ManifoldMixUp, MixUp

pytestmark = pytest.mark.slow

N,BS,TRAIN = 30,5,25

def app(learn, taps, loss, item=None):
    "A Learner, the layers that receive its inputs, its mixed loss, and an item to predict"
    return SimpleNamespace(learn=quiet(learn), taps=taps.split(), loss=loss, item=item)

def valid(n=N): return IndexSplitter(list(range(TRAIN, n)))

def images(path, n=N, size=32):
    for i in range(n): Image.fromarray(np.random.randint(0, 256, (size, size, 3), dtype=np.uint8)).save(path/f'{i:02}_{i%3}.png')
    return sorted(path.glob('*.png'))

def image_dls(path, y_block, get_y, x_block=ImageBlock, get_x=None, tfms=True, **kwargs):
    files = images(path)
    tfms = [*(aug_transforms(size=32) if tfms else []), NormalizeImages.from_stats(*imagenet_stats)]
    block = DataBlock((x_block, y_block), get_x=get_x, get_y=get_y, splitter=valid(), batch_tfms=tfms, **kwargs)
    return block.dataloaders(files, path=path, bs=BS, num_workers=0, device='cpu')

def number(file): return int(file.stem[:2])
def kind(file): return file.stem[-1]

def resnet(path):
    return app(vision_learner(image_dls(path, CategoryBlock, kind), resnet18, pretrained=False), '0.0', mixed_ce(), path/'00_0.png')

def xresnet(path):
    dls = image_dls(path, CategoryBlock, kind)
    return app(Learner(dls, xresnet18(n_out=3), loss_func=LabelSmoothingCE(0.)), '0.0', mixed_ce())

def multi_label(path):
    dls = image_dls(path, MultiCategoryBlock, lambda f: ['abc'[number(f)%3], 'def'[number(f)%2]])
    return app(vision_learner(dls, resnet18, pretrained=False), '0.0', mixed_targets(F.binary_cross_entropy_with_logits), path/'00_0.png')

def image_regression(path):
    dls = image_dls(path, RegressionBlock(n_out=2), lambda f: [number(f)/10, number(f)%7/3])
    return app(vision_learner(dls, resnet18, pretrained=False, n_out=2), '0.0', mixed_targets(F.mse_loss), path/'00_0.png')

def masks(path, void=None):
    def mask(f):
        y = np.random.default_rng(number(f)).integers(0, 3, (32, 32), dtype=np.uint8)
        return np.where(y == 2, void, y).astype(np.uint8) if void else y
    dls = image_dls(path, MaskBlock(codes=list('abc')), mask)
    loss_func = CrossEntropyLossFlat(axis=1, ignore_index=void or -100)
    return app(unet_learner(dls, resnet18, pretrained=False, n_out=3, loss_func=loss_func, opt_func=SGD), 'layers.0.0',
        mixed_ce(void or -100), path/'00_0.png')

def masks_with_void(path): return masks(path, void=255)

class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(64, 3)
    def forward(self, a, b): return self.head(torch.cat([self.encoder(a), self.encoder(b)], 1))

def siamese(path):
    files = images(path)
    block = DataBlock((ImageBlock, ImageBlock, CategoryBlock), n_inp=2, getters=[lambda f: f, lambda f: files[(number(f)*7+1) % N], kind],
        get_items=lambda o: o, splitter=valid(), batch_tfms=NormalizeImages.from_stats(*imagenet_stats))
    dls = block.dataloaders(files, path=path, bs=BS, num_workers=0, device='cpu')
    return app(Learner(dls, Siamese(), loss_func=CrossEntropyLossFlat()), 'encoder.0', mixed_ce(), files[0])

def table(cats, conts, regression=False):
    def build(path):
        df = pd.DataFrame(dict(a=[f'a{i%6}' for i in range(N)], b=[f'b{i//6}' for i in range(N)], c=np.random.normal(size=N),
            d=np.random.normal(size=N),
                               y=np.random.normal(size=N) if regression else [f'y{i%3}' for i in range(N)]))
        df.loc[3, 'c'] = np.nan
        cat_names,cont_names = ['a', 'b']*cats,['c', 'd']*conts
        dls = TabularDataLoaders.from_df(df, path, [Categorify, FillMissing, Normalize], cat_names, cont_names, 'y', bs=BS, device='cpu',
            valid_idx=list(range(TRAIN, N)), y_block=RegressionBlock() if regression else CategoryBlock())
        learn = tabular_learner(dls, layers=[20, 10])
        taps = ' '.join([*(f'embeds.{i}' for i in range(len(learn.model.embeds))), *['bn_cont']*conts])
        return app(learn, taps, mixed_targets(F.mse_loss) if regression else mixed_ce(), df.drop(columns='y').iloc[0])
    return build

def collab(use_nn):
    def build(path):
        df = pd.DataFrame(dict(user=[i%6 for i in range(N)], item=[i//6 for i in range(N)], rating=np.random.rand(N)*5))
        dls = CollabDataLoaders.from_df(df, path=path, bs=BS, device='cpu', seed=0)
        learn = collab_learner(dls, n_factors=8, use_nn=use_nn, y_range=(0, 5.5))
        return app(learn, 'embeds.0 embeds.1' if use_nn else 'u_weight i_weight u_bias i_bias', mixed_targets(F.mse_loss))
    return build

VOCAB = ['xxunk', 'xxpad', *(f'w{i}' for i in range(40))]
def words(n): return np.random.choice(VOCAB[2:], n).tolist()
def noop_tokens(o): return o

def text_dls(path, lengths, bs=BS):
    df = pd.DataFrame(dict(text=[words(n) for n in lengths], y=[f'y{i%2}' for i in range(len(lengths))]))
    block = DataBlock((TextBlock(noop_tokens, VOCAB), CategoryBlock), get_x=ColReader('text'), get_y=ColReader('y'),
                      splitter=valid(len(df)))
    return block.dataloaders(df, path=path, bs=bs, num_workers=0, device='cpu')

LENGTHS = [[200, 150, 80, 20, 5, 70][i%6] + i for i in range(N)]

def texts(path, lengths=LENGTHS):
    config = {**awd_lstm_clas_config, 'emb_sz': 8, 'n_hid': 10, 'n_layers': 2, 'embed_p': 0.}
    learn = text_classifier_learner(text_dls(path, lengths), AWD_LSTM, config=config, pretrained=False, path=path)
    return app(learn, '0.module.encoder_dp', mixed_ce(), learn.dls.valid_ds.items.iloc[0])

def language(path):
    df = pd.DataFrame(dict(text=[words(40) for _ in range(N)]))
    block = DataBlock(TextBlock(noop_tokens, VOCAB, is_lm=True), get_x=ColReader('text'), splitter=valid())
    dls = block.dataloaders(df, path=path, bs=BS, seq_len=20, device='cpu')
    config = {**awd_lstm_lm_config, 'emb_sz': 8, 'n_hid': 10, 'n_layers': 2, 'embed_p': 0.}
    learn = language_model_learner(dls, AWD_LSTM, config=config, pretrained=False, path=path)
    return app(learn, '0.encoder_dp', mixed_tokens)

def tensors(path, xs, model, taps, ys=None, loss=None, loss_func=None):
    data = list(zip(xs, torch.arange(N)%3 if ys is None else ys))
    dls = DataLoaders(DataLoader(data[:TRAIN], bs=BS, shuffle=True), DataLoader(data[TRAIN:], bs=BS), path=path, device='cpu')
    return app(Learner(dls, model, loss_func=loss_func or CrossEntropyLossFlat()), taps, loss or mixed_ce())

def signals(path):
    model = nn.Sequential(nn.Conv1d(2, 8, 5), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(8, 3))
    return tensors(path, torch.randn(N, 2, 40), model, '0')

def volumes(path):
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1),
        nn.Flatten(), nn.Linear(8, 3))
    return tensors(path, torch.randn(N, 1, 7, 8, 9), model, '0')

def seq2seq(path): return tensors(path, torch.randint(3, 40, (N, 7)), Seq2Seq(), 'encode decode')

class Logits(nn.Module):
    def __init__(self, model, keywords=True):
        super().__init__()
        self.model,self.keywords = model,keywords
    def forward(self, batch):
        if self.keywords: return self.model(**batch).logits
        return self.model(batch['input_ids'], batch['attention_mask'], batch['token_type_ids']).logits

def transformer(kind='Bert', keywords=True, **kwargs):
    def build(path):
        transformers = pytest.importorskip('transformers')
        config = getattr(transformers, f'{kind}Config')(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=32,
            num_labels=3, max_position_embeddings=32, type_vocab_size=2, hidden_dropout_prob=0., attention_probs_dropout_prob=0., **kwargs)
        model = Logits(getattr(transformers, f'{kind}ForSequenceClassification')(config), keywords)
        mask = (torch.arange(12) < torch.randint(4, 13, (N, 1))).long()
        ids = dict(input_ids=torch.randint(2, 50, (N, 12)), attention_mask=mask, token_type_ids=torch.randint(0, 2, (N, 12)))
        xs = [transformers.BatchEncoding({k: v[i] for k,v in ids.items()}) for i in range(N)]
        found = [name for name,_ in model.named_modules() if name.endswith(('word_embeddings', 'token_type_embeddings'))]
        return tensors(path, xs, model, ' '.join(found))
    return build

APPS = dict(resnet=resnet, xresnet=xresnet, multi_label=multi_label, image_regression=image_regression, masks=masks,
    masks_with_void=masks_with_void,
    siamese=siamese, table=table(True, True), table_cont=table(False, True), table_cat=table(True, False),
    table_regression=table(True, True, True),
    table_cont_regression=table(False, True, True), table_cat_regression=table(True, False, True), collab=collab(False),
    collab_nn=collab(True),
    texts=texts, short_texts=lambda path: texts(path, [5+i for i in range(N)]), language=language, seq2seq=seq2seq, signals=signals,
    volumes=volumes,
    bert=transformer(), bert_positional=transformer(keywords=False), bert_eager=transformer(attn_implementation='eager'),
    deberta=transformer('DebertaV2'))
NO_HIDDEN = 'collab'
CALLBACKS = dict(mix_up=MixUp, manifold=ManifoldMixUp)
PAIRS = [(name, cb) for name in APPS for cb in CALLBACKS]

def build(name, tmp_path_factory):
    torch.manual_seed(0)
    np.random.seed(0)
    return APPS[name](tmp_path_factory.mktemp(name))

def fit(app, *args):
    "What a spy saw of the batches"
    app.learn.fit(*args, cbs=[Before(), spy := Spy(app.taps)])
    return spy.batches

@pytest.fixture(scope='module', params=PAIRS, ids='-'.join)
def fitted(request, tmp_path_factory):
    "An application after its training, and what was seen of its batches"
    name,cb = request.param
    app = build(name, tmp_path_factory)
    app.hidden = cb == 'manifold' and name != NO_HIDDEN
    app.learn.add_cb(CALLBACKS[cb]())
    with warnings.catch_warnings():
        if name == NO_HIDDEN: warnings.filterwarnings('ignore', '.*mixes at its input only')
        app.batches = fit(app, 4 if name == 'language' else 1, 1e-3)
    return app

def trained(batches): return [b for b in batches if b.training]

def check_loss(app, b): close(b.loss, app.loss(b.pred, b.yb[0], matrix(b)[1]))

def test_loss_follows_from_what_the_layers_saw(fitted):
    batches = trained(fitted.batches)
    assert len(batches) > 3
    for b in batches: check_loss(fitted, b)

def test_hidden_places_are_drawn(fitted):
    found = {matrix(b)[0] for b in trained(fitted.batches)}
    assert bool(found - {'input'}) == fitted.hidden

def test_validation_is_unmixed(fitted):
    batches = [b for b in fitted.batches if not b.training]
    assert batches
    for b in batches:
        assert not was_mixed(places(b)['input'])
        close(b.loss, fitted.loss(b.pred, b.yb[0], torch.eye(b.n).double()))

def test_predictions_are_those_without_the_callback(fitted):
    learn = fitted.learn
    def answers():
        res = [learn.get_preds(reorder=False)[0], learn.validate()]
        return res if fitted.item is None else [*res, learn.predict(fitted.item)[2]]
    found = answers()
    with learn.removed_cbs(learn.cbs[-1]): want = answers()
    for a,b in zip(found, want): close(a, b, 1e-6)

@pytest.mark.parametrize('name', ['signals', 'table', 'texts', 'siamese', 'bert'])
@pytest.mark.parametrize('cb', CALLBACKS)
def test_lr_find_and_then_fit(name, cb, tmp_path_factory):
    app = build(name, tmp_path_factory)
    before = [plain(p).clone() for p in app.learn.model.parameters()]
    app.learn.add_cb(CALLBACKS[cb]()).lr_find(num_it=10, show_plot=False, suggest_funcs=None)
    for p,old in zip(app.learn.model.parameters(), before): close(p, old, 0)
    for b in trained(fit(app, 1)): check_loss(app, b)

def test_texts_are_mixed_in_every_chunk(tmp_path_factory):
    app = build('texts', tmp_path_factory)
    app.learn.add_cb(MixUp())
    batches = trained(fit(app, 1, 0.))
    weight = plain(app.learn.model[0].module.encoder.weight)
    for b in batches:
        M,own = matrix(b)[1].float(),weight[plain(b.xb[0])]
        for chunk,seen in zip(own.split(72, 1), b.seen, strict=True): close(seen, torch.tensordot(M, chunk, 1)[:len(seen)])
    assert any(len(seen) < b.n for b in batches for seen in b.seen)

@pytest.mark.parametrize('cb', CALLBACKS)
def test_language_model_keeps_one_plan_per_epoch(cb, tmp_path_factory):
    app = build('language', tmp_path_factory)
    app.learn.add_cb(CALLBACKS[cb]())
    batches = trained(fit(app, 3, 1e-3))
    n = len(batches)//3
    epochs = [[matrix(b) for b in batches[i*n:(i+1)*n]] for i in range(3)]
    for epoch in epochs:
        for place,M in epoch:
            assert place == epoch[0][0]
            close(M, epoch[0][1], .01)
    assert not torch.allclose(epochs[0][0][1], epochs[1][0][1], atol=.02)

POINTS = dict(points=[PointBlock], boxes=[BBoxBlock, BBoxLblBlock])
@pytest.mark.parametrize('what', POINTS)
@pytest.mark.parametrize('cb', CALLBACKS)
def test_points_and_boxes_are_refused(what, cb, tmp_path):
    get_y = [lambda f: torch.rand(3, 2)*32, lambda f: list('abc')]
    if what == 'boxes': get_y[0] = lambda f: [[1, 2, 9, 9+i] for i in range(3)]
    block = DataBlock((ImageBlock, *POINTS[what]), get_y=get_y[:len(POINTS[what])], n_inp=1, splitter=valid())
    dls = block.dataloaders(images(tmp_path), path=tmp_path, bs=BS, num_workers=0, device='cpu')
    learn = quiet(Learner(dls, xresnet18(n_out=6), loss_func=MSELossFlat(), cbs=CALLBACKS[cb]()))
    with pytest.raises(TypeError, match='points and boxes cannot be averaged'): learn.fit(1)
